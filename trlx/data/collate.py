"""Rollouts become tensors here: the only file that pads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trlx.batch import Rollout, TokenBatch


class RowFormat(Protocol):
    """What a trainer must know of the kind of model it trains."""

    separator: str
    """Stands between prompt and output in the samples that reward_fn and metric_fn get."""
    special_tokens: bool
    """Whether texts are tokenized with what the tokenizer adds by itself."""

    def width(self, prompt: int, response: int) -> int:
        """Tokens of the longest row that a prompt and a response of these lengths make."""

    def collate(self, rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
        """The rollouts as a batch."""

    def beginnings(self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """What stands before each response in a sequence that is returned to the user, int64 [B, T]."""


class DecoderRows:
    """Decoders: a row is prompt and response."""

    separator: ClassVar[str] = ""
    special_tokens: ClassVar[bool] = False

    def width(self, prompt: int, response: int) -> int:
        return prompt + response

    def collate(self, rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
        return collate(rollouts, pad_id)

    def beginnings(self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        padded = tokenizer.pad({"input_ids": prompts}, padding=True, return_attention_mask=False, return_tensors="pt")
        return padded["input_ids"]


@dataclass(frozen=True)
class EncoderDecoderRows:
    """Encoder-decoder models: the prompt is the encoder's row; the decoder's is `start_id` and the response."""

    start_id: int
    separator: str = "<sep>"
    special_tokens: ClassVar[bool] = True

    def width(self, prompt: int, response: int) -> int:
        return max(prompt, 1 + response)

    def collate(self, rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
        return collate_encoder_decoder(rollouts, pad_id, self.start_id)

    def beginnings(self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        return torch.full((len(prompts), 1), self.start_id)


def collate(rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
    """Rows of prompt, response, padding; masks come from lengths, so `pad_id` may be the eos token.

    A scalar score stands at the last trained response token. A dense one starts at the first response token and counts
    0 where it ends early.

    Raises:
        ValueError: no rollouts, an empty prompt, nothing to train on, or lists longer than the response.
    """
    if not rollouts:
        raise ValueError("There are no rollouts to make a batch of")
    for index, rollout in enumerate(rollouts):
        _check(index, rollout)
    lengths = [len(r.prompt) + len(r.response) for r in rollouts]
    width = max(lengths)
    return TokenBatch(
        tokens=pad_columns([[*r.prompt, *r.response] for r in rollouts], width, pad_id),
        attention_mask=torch.arange(width) < torch.tensor(lengths)[:, None],
        response_mask=pad_columns([[False] * len(r.prompt) + _trained(r) for r in rollouts], width, False),
        scores=pad_columns([[0.0] * len(r.prompt) + _token_scores(r) for r in rollouts], width, 0.0),
        group=torch.tensor([r.group for r in rollouts]),
    )


def collate_encoder_decoder(rollouts: Sequence[Rollout], pad_id: int, start_id: int) -> TokenBatch:
    """Rows of `start_id`, response, padding for the decoder, and of the prompt for the encoder; else as `collate`."""
    starts = [dataclasses.replace(r, prompt=[start_id] if r.prompt else []) for r in rollouts]
    batch = collate(starts, pad_id)
    encoder_tokens, encoder_mask = right_pad([r.prompt for r in rollouts], pad_id)
    return batch.replace(encoder_tokens=encoder_tokens, encoder_mask=encoder_mask.bool())


def pad_columns(rows: Sequence[Tensor | list], width: int, value: Any) -> Tensor:
    """[B, width]: each 1-D row padded on the right with `value`.

    The type is that of the first row if it is a tensor, else torch's choice for the numbers (float32, int64 or bool).
    """
    dtype = rows[0].dtype if isinstance(rows[0], Tensor) else None
    lists = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in lists], dtype=dtype)


def left_pad(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, attention mask), both int64 [B, T] as ``transformers`` samplers want them: prompts end in one column."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64)
    return tokens, mask


def right_pad(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, attention mask), both int64 [B, T]: rows begin in one column."""
    width = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    return pad_columns(rows, width, pad_id), (torch.arange(width) < lengths[:, None]).long()


def _check(index: int, rollout: Rollout) -> None:
    length = len(rollout.response)
    if not rollout.prompt:
        raise ValueError(f"Rollout {index} has an empty prompt; its first response token would depend on nothing")
    if rollout.trained is not None and len(rollout.trained) != length:
        raise ValueError(f"Rollout {index} has {len(rollout.trained)} flags in `trained` for {length} response tokens")
    if True not in _trained(rollout):
        raise ValueError(f"Rollout {index} has no response token to train on")
    if isinstance(rollout.score, list) and len(rollout.score) > length:
        raise ValueError(f"Rollout {index} has {len(rollout.score)} scores for {length} response tokens")


def _trained(rollout: Rollout) -> list[bool]:
    return [True] * len(rollout.response) if rollout.trained is None else rollout.trained


def _token_scores(rollout: Rollout) -> list[float]:
    """One score per response token."""
    if isinstance(rollout.score, list):
        return [*rollout.score] + [0.0] * (len(rollout.response) - len(rollout.score))
    trained = _trained(rollout)
    after = trained[::-1].index(True)
    return [0.0] * (len(trained) - after - 1) + [rollout.score] + [0.0] * after
