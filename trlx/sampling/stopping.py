"""Stop sequences: texts that end a response. The tokens are cut, not the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class Stopper:
    """Finds stop sequences in responses. A special token, e.g. ``"<|im_end|>"``, can be one too.

    Raises:
        ValueError: `stop_sequences` is not a list of texts, or one of them is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_sequences: Sequence[str]):
        if isinstance(stop_sequences, str) or not all(isinstance(stop, str) and stop for stop in stop_sequences):
            raise ValueError(f"stop_sequences must be a list of non-empty texts, got {stop_sequences!r}")
        self.tokenizer = tokenizer
        self.stop_sequences = list(stop_sequences)
        # a token has at least one byte, so this many tokens hold a whole stop sequence; a UTF-8 character has up to 4
        # bytes, and the first token may begin inside one, hence 3 more
        self._tail = max((len(stop.encode()) for stop in self.stop_sequences), default=0) + 3
        self._ends = {stop[-1] for stop in self.stop_sequences} | {"\ufffd"}
        self._may_end: dict[int, bool] = {}

    def done(self, ids: Sequence[int], start: int = 0) -> bool:
        """Whether the last token completes a stop sequence behind the first `start` ids. Call it after every token."""
        if not self._can_end(ids[-1]):
            return False
        text = self._text(ids[max(start, len(ids) - self._tail) :])
        return any(stop in text for stop in self.stop_sequences)

    def cut(self, response_ids: Sequence[int]) -> tuple[list[int], bool]:
        """(the tokens before the first stop sequence, whether there is one).

        Removes every token that holds a character of the stop sequence or stands behind it, then tokens of white space
        at the end.
        """
        ids, text = list(response_ids), self._text(response_ids)
        found = [start for start in map(text.find, self.stop_sequences) if start >= 0]
        if not found:
            return ids, False
        # from the end, because the stop sequence that ended the response is near the end
        while ids and len(self._text(ids)) > min(found):
            ids.pop()
        while ids and not self._text(ids[-1:]).strip():
            ids.pop()
        return ids, True

    def finish(self, response_ids: Sequence[int]) -> tuple[list[int], bool]:
        """(the response with an eos in place of its stop sequence, whether there is one)."""
        ids, was_cut = self.cut(response_ids)
        end = [self.tokenizer.eos_token_id]
        return [*ids, *end] if was_cut and ids[-1:] != end else ids, was_cut

    def criteria(self, prompt_width: int) -> Callable[..., Tensor]:
        """For ``generate`` of transformers: says which rows [prompt_width + new] are done."""

        def done(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            start = max(prompt_width, input_ids.shape[1] - self._tail)
            return torch.tensor([self.done(row) for row in input_ids[:, start:].tolist()], device=input_ids.device)

        return done

    def _can_end(self, token: int) -> bool:
        """Whether a stop sequence may end in this token: it has the last character of one, or a part of a character.
        A space may come from between tokens, so that any token can end with it."""
        if token not in self._may_end:
            self._may_end[token] = any(end == " " or end in self._text([token]) for end in self._ends)
        return self._may_end[token]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
