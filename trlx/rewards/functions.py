"""Reward functions that many tasks need: for right answers, for a format, against length and repetition."""

from __future__ import annotations

import re
from decimal import Decimal
from inspect import Parameter, Signature
from keyword import iskeyword
from typing import Any

from trlx.tracebacks import short_errors

NUMBER = re.compile(
    r"(?:(?<![\w)])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?"
)
FINAL = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}|####(.*)")
"""Where a text marks its final answer: as LaTeX does, or as the data set GSM8K."""
FRACTION = re.compile(r"(?<![\d/])\d+\s*/\s*[\d.,]+\D*\Z|\\[dt]?frac[^a-zA-Z=]*\Z")
"""A text whose last number is a part of a fraction."""


def last_number(text: str) -> Decimal | None:
    r"""The last number of a text; of its last ``\boxed{...}`` or ``#### ...`` if it has one; None if there is none.

    "1,234", "-3.5", ".5" and "6e3" are numbers. In "5-3" the last number is 3, not -3.
    """
    found = NUMBER.findall(_final(re.sub(r"\{,\}|,\\!", ",", text)))  # thousands in LaTeX
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


class SampleReward:
    """A reward_fn that scores one sample at a time; ``score`` gets one sample's entry of each argument in `asks`."""

    def __init__(self, *asks: str):
        for name in asks:
            if not name.isidentifier() or iskeyword(name):
                raise ValueError(f"column must be a name that an argument can have, got {name!r}: rename this key")
        self.asks = asks
        # trlx reads it to see which arguments a function needs, and refuses prompts without them before it samples
        self.__signature__ = Signature([Parameter(name, Parameter.KEYWORD_ONLY) for name in asks])

    def __call__(self, **arguments: Any) -> list[float]:
        return [float(self.score(*row)) for row in zip(*map(arguments.__getitem__, self.asks), strict=True)]

    def text(self, answer: Any) -> str:
        """The answer of a prompt, which is the second argument, as a text; a ValueError if it is None or has parts."""
        if answer is None or isinstance(answer, (list, tuple, set, dict)):
            raise ValueError(f"the prompts' {self.asks[1]!r} must be a text or a number, got {answer!r}")
        return str(answer)


class ExactMatch(SampleReward):
    """1 where the output equals the prompt's `column`, else 0. Spaces around both, and with `ignore_case` case, do not
    count.

    With a regular expression `pattern`, the output's last match is compared in place of the output: the pattern's first
    group if it has groups. ``.`` matches line breaks, too. An output without a match scores 0.
    """

    @short_errors
    def __init__(self, column: str = "answer", pattern: str | re.Pattern | None = None, ignore_case: bool = False):
        super().__init__("outputs", column)
        self.pattern = None if pattern is None else _compiled(pattern)
        self.ignore_case = ignore_case

    def score(self, output: str, answer: Any) -> bool:
        answer = self.text(answer)
        if self.pattern is not None:
            matches = list(self.pattern.finditer(output))
            output = matches[-1][min(self.pattern.groups, 1)] if matches else None
            if output is None:
                return False
        ours, theirs = output.strip(), answer.strip()
        return ours.casefold() == theirs.casefold() if self.ignore_case else ours == theirs


class NumberMatch(SampleReward):
    """1 where `last_number` of the output is that of the prompt's `column`, up to `tolerance`; else 0.

    The column holds numbers or texts. For fractions and formulas take `MathMatch`. Raises a ValueError if an answer has
    no number, or a fraction as its last one.
    """

    @short_errors
    def __init__(self, column: str = "answer", tolerance: float = 0.0):
        super().__init__("outputs", column)
        self.tolerance = tolerance

    def score(self, output: str, answer: Any) -> bool:
        text = self.text(answer)
        found, right = last_number(output), last_number(text)
        if right is None:
            raise ValueError(f"the prompts' {self.asks[1]!r} must be a number or a text with one, got {answer!r}")
        if FRACTION.search(_final(text)):
            raise ValueError(
                f"the prompts' {self.asks[1]!r} must be a decimal number, got {text!r}: for fractions take MathMatch"
            )
        return found is not None and abs(found - right) <= self.tolerance


class RegexMatch(SampleReward):
    """1 where the regular expression `pattern` matches somewhere in the output, else 0; ``.`` matches line breaks."""

    @short_errors
    def __init__(self, pattern: str | re.Pattern):
        super().__init__("outputs")
        self.pattern = _compiled(pattern)

    def score(self, output: str) -> bool:
        return self.pattern.search(output) is not None


class LengthPenalty(SampleReward):
    """0 for responses of at most `start` tokens, then falling evenly to -1 at `end` tokens and more."""

    @short_errors
    def __init__(self, start: int, end: int):
        super().__init__("output_ids")
        if not 0 <= start < end:
            raise ValueError(f"LengthPenalty needs 0 <= start < end (tokens), got start={start}, end={end}")
        self.start, self.end = start, end

    def score(self, ids: list[int]) -> float:
        return max(min((self.start - len(ids)) / (self.end - self.start), 0.0), -1.0)


class RepetitionPenalty(SampleReward):
    """Minus the share of a response's n-grams of `size` tokens that occurred in it before."""

    @short_errors
    def __init__(self, size: int = 3):
        super().__init__("output_ids")
        if size < 1:
            raise ValueError(f"RepetitionPenalty needs a size of 1 token or more, got {size}")
        self.size = size

    def score(self, ids: list[int]) -> float:
        grams = list(zip(*(ids[start:] for start in range(self.size)), strict=False))
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


def _final(text: str) -> str:
    """The part of a text that is marked as its final answer; all of it if nothing is."""
    marked = FINAL.findall(text)
    return "".join(marked[-1]) if marked else text


def _compiled(pattern: str | re.Pattern) -> re.Pattern:
    return pattern if isinstance(pattern, re.Pattern) else re.compile(pattern, re.DOTALL)
