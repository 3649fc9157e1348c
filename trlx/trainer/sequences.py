"""Sampling as users ask for it: tensors with padding in, tensors with padding out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trlx.backends.base import Backend
from trlx.rollout.sampling import SamplingConfig


def sample_sequences(
    backend: Backend, tokenizer: Any, sampling: SamplingConfig, input_ids: Any, attention_mask: Any = None
) -> Tensor:
    """The prompts, padded on the tokenizer's padding side, each followed by its response; int64 [B, T + new].

    Of encoder-decoder models, whose prompts are another row, the decoder's start token and the response.

    `input_ids` is int64 [B, T] with padding where `attention_mask` is 0, or a list of id lists.
    """
    prompts = [torch.as_tensor(row).tolist() for row in input_ids]
    if attention_mask is not None:
        masks = [torch.as_tensor(mask).bool().tolist() for mask in attention_mask]
        pairs = zip(prompts, masks, strict=True)
        prompts = [[i for i, kept in zip(row, mask, strict=True) if kept] for row, mask in pairs]
    responses = backend.generate(prompts, sampling)
    beginnings = backend.layout.beginnings(prompts, tokenizer)
    width = max(len(response) for response in responses)
    rows = [response + [sampling.pad_token_id] * (width - len(response)) for response in responses]
    return torch.cat([beginnings, torch.tensor(rows, dtype=torch.int64).view(len(rows), width)], dim=1)
