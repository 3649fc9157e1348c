"""How prompt and response become rows, texts and sequences: one class for each kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trlx.batch import Rollout, TokenBatch
from trlx.data.collate import collate, collate_encoder_decoder


class Layout(Protocol):
    """What a trainer must know of the kind of model it trains."""

    separator: str
    """Stands between prompt and output in the samples that reward_fn and metric_fn get."""
    special_tokens: bool
    """Whether texts are tokenized with what the tokenizer adds by itself."""

    def collate(self, rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
        """The rollouts as a batch."""

    def width(self, prompt: int, response: int) -> int:
        """Tokens of the longest row that a prompt and a response of these lengths make."""

    def beginnings(self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """What stands before each response in a sequence that is returned to the user, int64 [B, T]."""


class OneRow:
    """Decoders: a row is prompt and response."""

    separator: ClassVar[str] = ""
    special_tokens: ClassVar[bool] = False

    def collate(self, rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
        return collate(rollouts, pad_id)

    def width(self, prompt: int, response: int) -> int:
        return prompt + response

    def beginnings(self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        padded = tokenizer.pad({"input_ids": prompts}, padding=True, return_attention_mask=False, return_tensors="pt")
        return padded["input_ids"]


@dataclass(frozen=True)
class TwoRows:
    """Encoder-decoder models: the prompt is the encoder's row; the decoder's is `start_id` and the response."""

    start_id: int
    separator: str = "<sep>"
    special_tokens: ClassVar[bool] = True

    def collate(self, rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
        return collate_encoder_decoder(rollouts, pad_id, self.start_id)

    def width(self, prompt: int, response: int) -> int:
        return max(prompt, 1 + response)

    def beginnings(self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        return torch.full((len(prompts), 1), self.start_id)
