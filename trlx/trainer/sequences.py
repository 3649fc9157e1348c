"""Sampling as users ask for it: texts in, texts out; tensors with padding in, tensors with padding out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trlx.backends.base import Backend
from trlx.data.chat import is_chat
from trlx.data.prompts import PromptPipeline
from trlx.sampling.settings import SamplingConfig


def sample(
    backend: Backend, tokenizer: Any, sampling: SamplingConfig, inputs: Any, attention_mask: Any = None
) -> str | list[str] | Tensor:
    """What follows a text or a chat, as a text; what follows each of several, as texts; else see `sample_sequences`."""
    if isinstance(inputs, str) or is_chat(inputs):
        return sample_texts(backend, tokenizer, sampling, [inputs])[0]
    if isinstance(inputs, (list, tuple)) and inputs and (isinstance(inputs[0], str) or is_chat(inputs[0])):
        return sample_texts(backend, tokenizer, sampling, inputs)
    return sample_sequences(backend, tokenizer, sampling, inputs, attention_mask)


def sample_texts(backend: Backend, tokenizer: Any, sampling: SamplingConfig, prompts: Sequence[Any]) -> list[str]:
    """The response to each text or chat, without special tokens and stop sequences."""
    pipeline = PromptPipeline(prompts, sys.maxsize, tokenizer, add_special_tokens=backend.row_format.special_tokens)
    responses = backend.generate([prompt.ids for prompt in pipeline], sampling)
    cut = [sampling.stop.cut(ids)[0] if sampling.stop else ids for ids in responses]
    return tokenizer.batch_decode(cut, skip_special_tokens=True)


def sample_sequences(
    backend: Backend, tokenizer: Any, sampling: SamplingConfig, input_ids: Any, attention_mask: Any = None
) -> Tensor:
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
    responses = backend.generate(prompts, sampling)
    beginnings = backend.row_format.beginnings(prompts, tokenizer)
    width = max(len(response) for response in responses)
    rows = [response + [sampling.pad_token_id] * (width - len(response)) for response in responses]
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
