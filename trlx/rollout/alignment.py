"""Numbers for the tokens of a retokenized text, moved to the tokens that were sampled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from trlx import logging

logger = logging.get_logger(__name__)


class Alignment:
    """Aligns dense scores of functions that do not know which tokens were sampled.

    All such a function can count are the tokens of ``tokenizer(output)``. They may be others than those sampled, for
    the tokenizer may begin with bos, split a text in another way, or know half a character as three tokens. Each number
    is then added to the sampled token that completes the text of its token; those of special tokens that the tokenizer
    adds before or behind the text to the first or the last one. So no number is lost.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._has_warned = False

    def __call__(
        self, name: str, scores: Sequence[float | list[float]], responses: Sequence[list[int]], outputs: Sequence[str]
    ) -> list[float | list[float]]:
        """The scores with dense ones aligned.

        Lists that are as long as ``tokenizer(output)``, with or without special tokens, count its tokens: all of them,
        or else those that are longer than their response. The rest stays as it is.

        Args:
            name: what a warning calls the function; it comes once.
        """
        rows = [row for row, score in enumerate(scores) if isinstance(score, list)]
        lengths, aligned = [len(scores[row]) for row in rows], list(scores)
        full, bare = self._tokens([outputs[row] for row in rows]), self._tokens([outputs[row] for row in rows], False)
        of_all = [tokens for tokens in (full, bare) if [*map(len, tokens)] == lengths]
        for index, row in enumerate(rows):
            possible = of_all or ([full, bare] if lengths[index] > len(responses[row]) else [])
            counted = [tokens[index] for tokens in possible if len(tokens[index]) == lengths[index]]
            if counted:
                places = self._places(counted[0], bare[index], responses[row])
                aligned[row] = self._moved(name, scores[row], places, len(responses[row]))
        return aligned

    def _tokens(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] if texts else []

    def _places(self, counted: list[int], bare: list[int], response: list[int]) -> list[int]:
        """For each token in `counted`, the `bare` ones and special ones around them, its place in the response."""
        before = next((i for i in range(len(counted)) if counted[i : i + len(bare)] == bare), 0)
        last, places = len(response) - 1, list(range(len(bare)))
        if bare != response[: len(bare)]:
            ends = self._ends(response)
            places = [min(bisect_left(ends, end), last) for end in self._ends(bare)]
        return [0] * before + places + [last] * (len(counted) - before - len(bare))

    def _ends(self, ids: list[int]) -> list[int]:
        """Where in the text each token ends."""
        texts = self.tokenizer.batch_decode([ids[: i + 1] for i in range(len(ids))], skip_special_tokens=True)
        return list(accumulate(map(len, texts), max))

    def _moved(self, name: str, numbers: list[float], places: list[int], length: int) -> list[float]:
        if places == list(range(len(numbers))):
            return numbers
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{name} returned a number for each token of tokenizer(output). Where these are not those that were "
                "sampled, numbers are added to the sampled tokens that complete their text. To be exact, let it take "
                "output_ids, the sampled ids, and return len(output_ids[i]) numbers"
            )
        tokens = [0.0] * length
        for place, number in zip(places, numbers, strict=True):
            tokens[place] += number
        return tokens
