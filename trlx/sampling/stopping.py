"""Stop sequences: texts that end a response. They stop the sampler and are cut off on tokens, never on text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from transformers import StoppingCriteria


class Stopper:
    """Finds stop sequences in responses.

    Responses are decoded with their special tokens, so the text of one, e.g. ``"<|im_end|>"``, can be a stop sequence.

    Raises:
        ValueError: `stop_sequences` is not a list of texts, or one of them is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_sequences: Sequence[str]):
        if isinstance(stop_sequences, str) or not all(isinstance(stop, str) and stop for stop in stop_sequences):
            raise ValueError(f"stop_sequences must be a list of non-empty texts, got {stop_sequences!r}")
        self.tokenizer = tokenizer
        self.stop_sequences = list(stop_sequences)
        # a token is at least one byte, so this many tokens hold any stop sequence that has just been completed; the
        # three more make up for a character that the tail begins in the middle of
        self._tail = max((len(stop.encode()) for stop in self.stop_sequences), default=0) + 3

    def done(self, response_ids: Sequence[int]) -> bool:
        """Whether the last token completed a stop sequence; to be asked after every token."""
        text = self._text(response_ids[-self._tail :])
        return any(stop in text for stop in self.stop_sequences)

    def cut(self, response_ids: Sequence[int]) -> tuple[list[int], bool]:
        """(the tokens before the first stop sequence, whether there was one).

        Kept are the most tokens whose text ends at or before the earliest stop sequence, less trailing tokens of white
        space only. A token that holds the stop sequence's beginning goes as a whole.
        """
        ids, text = list(response_ids), self._text(response_ids)
        found = [start for start in map(text.find, self.stop_sequences) if start >= 0]
        if not found:
            return ids, False
        # backwards, as the stop sequence that ended a response is near its end
        while ids and len(self._text(ids)) > min(found):
            ids.pop()
        while ids and not self._text(ids[-1:]).strip():
            ids.pop()
        return ids, True

    def finish(self, response_ids: Sequence[int]) -> tuple[list[int], bool]:
        """(the response without its stop sequence and ended by eos instead, whether there was one)."""
        ids, was_cut = self.cut(response_ids)
        end = [self.tokenizer.eos_token_id]
        return [*ids, *end] if was_cut and ids[-1:] != end else ids, was_cut

    def criteria(self, prompt_width: int) -> StoppingCriteria:
        """For ``transformers``' generate: tells for each row of [B, prompt_width + new] tokens whether it is done."""
        from transformers import StoppingCriteria

        stopper = self

        class StopSequences(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                start = max(prompt_width, input_ids.shape[1] - stopper._tail)
                done = [stopper.done(row) for row in input_ids[:, start:].tolist()]
                return torch.tensor(done, device=input_ids.device)

        return StopSequences()

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
