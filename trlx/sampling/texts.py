"""``trainer.generate``: texts or chats in and texts out, or padded token ids in and padded token ids out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trlx.batch import Sample
from trlx.data.chat import is_chat
from trlx.data.collate import RowFormat, right_pad
from trlx.data.prompts import PromptPipeline
from trlx.sampling.settings import SamplingConfig


@dataclass(frozen=True, slots=True)
class Respond:
    """Samples for a user; `draw` is like `Sampler.generate`."""

    draw: Callable[[list[list[int]], SamplingConfig], list[Sample]]
    tokenizer: PreTrainedTokenizerBase
    row_format: RowFormat
    sampling: SamplingConfig

    def __call__(self, inputs: Any, attention_mask: Any = None) -> str | list[str] | Tensor:
        """The response to one text or chat, the list of responses to several; for token ids see `sequences`."""
        if isinstance(inputs, str) or is_chat(inputs):
            return self.texts([inputs])[0]
        if isinstance(inputs, (list, tuple)) and inputs and (isinstance(inputs[0], str) or is_chat(inputs[0])):
            return self.texts(inputs)
        return self.sequences(inputs, attention_mask)

    def texts(self, prompts: Sequence[Any]) -> list[str]:
        """The response to each text or chat, without special tokens and stop sequences."""
        special = self.row_format.special_tokens
        pipeline = PromptPipeline(prompts, sys.maxsize, self.tokenizer, add_special_tokens=special)
        samples, stop = self.draw([prompt.ids for prompt in pipeline], self.sampling), self.sampling.stop
        responses = [stop.cut(sample.ids)[0] if stop else sample.ids for sample in samples]
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True)

    def sequences(self, input_ids: Any, attention_mask: Any = None) -> Tensor:
        """Prompts, padded on the tokenizer's padding side, then responses, padded on the right: int64 [B, T + new].

        For encoder-decoder models the decoder's start token stands in place of the prompt.

        Args:
            input_ids: int64 [B, T], or a list of lists of ids.
            attention_mask: [B, T], 0 for padding.

        Raises:
            TypeError: `input_ids` are not token ids.
            ValueError: there are no prompts, or one has no tokens.
        """
        prompts = _ids(input_ids)
        if attention_mask is not None:
            pairs = zip(prompts, map(torch.as_tensor, attention_mask), strict=True)
            prompts = [[i for i, kept in zip(row, mask.tolist(), strict=True) if kept] for row, mask in pairs]
        if not prompts or not all(prompts):
            raise ValueError(f"trainer.generate() got {'a prompt without tokens' if prompts else 'no prompts'}")
        responses = [sample.ids for sample in self.draw(prompts, self.sampling)]
        padded, _ = right_pad(responses, self.sampling.pad_token_id)
        return torch.cat([self.row_format.beginnings(prompts, self.tokenizer), padded.long()], dim=1)


def _ids(given: Any) -> list[list[int]]:
    try:
        rows = [torch.as_tensor(row).tolist() for row in given]
    except (TypeError, ValueError, RuntimeError):
        rows = [None]
    if all(isinstance(row, list) and all(type(token) is int for token in row) for row in rows):
        return rows
    raise TypeError(
        "trainer.generate() takes a text or a chat, a list of them, token ids [B, T] or a list of lists of ids, got "
        f"{repr(given)[:80]}"
    )
