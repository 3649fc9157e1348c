"""Sampling as users ask for it: texts in, texts out; tensors with padding in, tensors with padding out."""

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
from trlx.data.collate import RowFormat
from trlx.data.prompts import PromptPipeline
from trlx.sampling.settings import SamplingConfig


@dataclass(frozen=True, slots=True)
class Respond:
    """Answers what a user asks.

    Args:
        draw: see `Sampler.generate`.
    """

    draw: Callable[[list[list[int]], SamplingConfig], list[Sample]]
    tokenizer: PreTrainedTokenizerBase
    row_format: RowFormat
    sampling: SamplingConfig

    def __call__(self, inputs: Any, attention_mask: Any = None) -> str | list[str] | Tensor:
        """What follows a text or a chat, as a text; what follows each of several, as texts; else see `sequences`."""
        if isinstance(inputs, str) or is_chat(inputs):
            return self.texts([inputs])[0]
        if isinstance(inputs, (list, tuple)) and inputs and (isinstance(inputs[0], str) or is_chat(inputs[0])):
            return self.texts(inputs)
        return self.sequences(inputs, attention_mask)

    def texts(self, prompts: Sequence[Any]) -> list[str]:
        """The response to each text or chat, without special tokens and stop sequences."""
        pipeline = PromptPipeline(
            prompts, sys.maxsize, self.tokenizer, add_special_tokens=self.row_format.special_tokens
        )
        responses = [sample.ids for sample in self.draw([prompt.ids for prompt in pipeline], self.sampling)]
        stop = self.sampling.stop
        cut = [stop.cut(ids)[0] if stop else ids for ids in responses]
        return self.tokenizer.batch_decode(cut, skip_special_tokens=True)

    def sequences(self, input_ids: Any, attention_mask: Any = None) -> Tensor:
        """The prompts, padded on the tokenizer's padding side, each followed by its response; int64 [B, T + new].

        Of encoder-decoder models, whose prompts are another row, the decoder's start token and the response.

        `input_ids` is int64 [B, T] with padding where `attention_mask` is 0, or a list of id lists.
        """
        prompts = _ids(input_ids)
        if attention_mask is not None:
            masks = [torch.as_tensor(mask).bool().tolist() for mask in attention_mask]
            pairs = zip(prompts, masks, strict=True)
            prompts = [[i for i, kept in zip(row, mask, strict=True) if kept] for row, mask in pairs]
        if not prompts or not all(prompts):
            raise ValueError(f"trainer.generate() got {'a prompt without tokens' if prompts else 'no prompts'}")
        responses = [sample.ids for sample in self.draw(prompts, self.sampling)]
        beginnings = self.row_format.beginnings(prompts, self.tokenizer)
        width = max(len(response) for response in responses)
        rows = [response + [self.sampling.pad_token_id] * (width - len(response)) for response in responses]
        return torch.cat([beginnings, torch.tensor(rows, dtype=torch.int64).view(len(rows), width)], dim=1)


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
