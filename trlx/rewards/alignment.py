"""Moves the numbers of a dense score from the tokens of a retokenized text to the tokens that were sampled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from trlx import logging

logger = logging.get_logger(__name__)


class Alignment:
    """Aligns dense scores of functions that do not know which tokens were sampled.

    Such a function can count only the tokens of ``tokenizer(output)``. They may differ from the sampled tokens: the
    tokenizer may add bos, split the text in another way, or need three tokens for the sign of half a character. Each
    number is added to the sampled token that completes the same text. Numbers of special tokens that the tokenizer adds
    before or behind the text go to the first or last sampled token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._has_warned = False

    def __call__(
        self, name: str, scores: Sequence[float | list[float]], responses: Sequence[list[int]], outputs: Sequence[str]
    ) -> list[float | list[float]]:
        """The scores, with dense ones aligned.

        A list as long as ``tokenizer(output)``, with or without special tokens, is taken to be about these tokens if
        the lists of all samples are that long, or if it is longer than its response. Other lists do not change. One
        warning for all calls shows `name`, the function's.
        """
        rows = [row for row, score in enumerate(scores) if isinstance(score, list)]
        if not rows:
            return list(scores)
        lengths, aligned, texts = [len(scores[row]) for row in rows], list(scores), [outputs[row] for row in rows]
        full, bare = (self.tokenizer(texts, add_special_tokens=a, verbose=False)["input_ids"] for a in (True, False))
        fits_all = [tokens for tokens in (full, bare) if [*map(len, tokens)] == lengths]
        for index, row in enumerate(rows):
            possible = fits_all or ([full, bare] if lengths[index] > len(responses[row]) else [])
            counted = next((ids[index] for ids in possible if len(ids[index]) == lengths[index]), None)
            if counted is not None:
                aligned[row] = self._moved(name, scores[row], counted, bare[index], responses[row])
        return aligned

    def _moved(
        self, name: str, numbers: list[float], counted: list[int], bare: list[int], response: list[int]
    ) -> list[float]:
        """One number per response token, from one per token of `counted`: `bare` with special tokens around it."""
        before = next((i for i in range(len(counted)) if counted[i : i + len(bare)] == bare), 0)
        last, places = len(response) - 1, list(range(len(bare)))
        if bare != response[: len(bare)]:
            ends = self._ends(response)
            places = [min(bisect_left(ends, end), last) for end in self._ends(bare)]
        places = [0] * before + places + [last] * (len(counted) - before - len(bare))
        if places == list(range(len(numbers))):
            return numbers
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{name} returned a number for each token of tokenizer(output), and some of these tokens differ from "
                "the sampled ones. trlx adds each number to the sampled token that completes the same text. For exact "
                "rewards take the argument output_ids (the sampled ids), and return len(output_ids[i]) numbers"
            )
        tokens = [0.0] * len(response)
        for place, number in zip(places, numbers, strict=True):
            tokens[place] += number
        return tokens

    def _ends(self, ids: list[int]) -> list[int]:
        """For each token, the number of characters up to its end."""
        texts = self.tokenizer.batch_decode([ids[: i + 1] for i in range(len(ids))], skip_special_tokens=True)
        return list(accumulate(map(len, texts), max))
