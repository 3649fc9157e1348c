"""Rollouts become tensors here: the only file that pads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from trlx.batch import Rollout, TokenBatch


class RowFormat:
    """How prompts and responses become rows. Here as a decoder reads them: prompt and response in one row."""

    separator: str = ""
    """Stands between prompt and output in the samples that reward_fn and metric_fn get."""
    special_tokens: bool = False
    """Whether prompts and outputs get all special tokens that the tokenizer adds."""

    def width(self, prompt: int, response: int) -> int:
        """The number of tokens of the longest row that a prompt and a response of these lengths need."""
        return prompt + response

    def collate(self, rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
        """The rollouts as a batch, see the function `collate`."""
        return collate(rollouts, pad_id)

    def beginnings(self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """The tokens before each response in a sequence that the user gets, int64 [B, T]."""
        return tokenizer.pad({"input_ids": prompts}, return_attention_mask=False, return_tensors="pt")["input_ids"]


@dataclass(frozen=True)
class EncoderDecoderRows(RowFormat):
    """As encoder-decoder models read them: the prompt for the encoder, `start_id` and the response for the decoder."""

    start_id: int
    separator: str = "<sep>"
    special_tokens: ClassVar[bool] = True

    def width(self, prompt: int, response: int) -> int:
        return max(prompt, 1 + response)

    def collate(self, rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
        starts = [dataclasses.replace(r, prompt=[self.start_id] if r.prompt else []) for r in rollouts]
        batch = collate(starts, pad_id)
        encoder_tokens, encoder_mask = right_pad([r.prompt for r in rollouts], pad_id)
        return batch.replace(encoder_tokens=encoder_tokens, encoder_mask=encoder_mask.bool())

    def beginnings(self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        return torch.full((len(prompts), 1), self.start_id)


def collate(rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
    """Rows of prompt, response, padding. Masks come from lengths, so `pad_id` may be the eos token.

    A scalar score stands at the last trained response token. A dense score starts at the first response token; missing
    numbers at its end are 0. Raises a ValueError for no rollouts, and names a rollout that cannot be a row.
    """
    if not rollouts:
        raise ValueError("There are no rollouts to make a batch of")
    for index, rollout in enumerate(rollouts):
        _check(index, rollout)
    tokens, mask = right_pad([[*r.prompt, *r.response] for r in rollouts], pad_id)
    return TokenBatch(
        tokens=tokens,
        attention_mask=mask.bool(),
        response_mask=_padded([[False] * len(r.prompt) + _trained(r) for r in rollouts], False),
        scores=_padded([[0.0] * len(r.prompt) + _token_scores(r) for r in rollouts], 0.0),
        group=torch.tensor([r.group for r in rollouts]),
        old_logprobs=_said(rollouts, "logprobs"),
        old_values=_said(rollouts, "values"),
        ref_logprobs=_said(rollouts, "ref_logprobs"),
    )


def drawn_logprobs(rollouts: Sequence[Rollout], batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(the sampler's log-probabilities, where it gave one): float32 and bool [B, T] for the rows of `rollouts`."""
    drawn, known = torch.zeros(batch.tokens.shape), torch.zeros_like(batch.response_mask)
    for row, rollout in enumerate(rollouts):
        if rollout.logprobs:
            # an eos in place of a stop sequence has none
            at = batch.response_mask[row].nonzero().squeeze(1)[: len(rollout.logprobs)]
            drawn[row, at], known[row, at] = torch.tensor(rollout.logprobs), True
    return drawn, known


def left_pad(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, attention mask), both int64 [B, T]; all rows end in the last column, as ``transformers`` samples."""
    return _padded(rows, pad_id, "left"), _padded([[1] * len(row) for row in rows], 0, "left")


def right_pad(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, attention mask), both int64 [B, T]; all rows begin in the first column."""
    return _padded(rows, pad_id), _padded([[1] * len(row) for row in rows], 0)


def _padded(rows: Sequence[list], value: float, side: str = "right") -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], True, value, side)


def _said(rollouts: Sequence[Rollout], name: str) -> Tensor | None:
    """The numbers of all response tokens; None unless every rollout has them all."""
    rows = [getattr(r, name) for r in rollouts]
    if any(row is None or len(row) != len(r.response) for row, r in zip(rows, rollouts, strict=True)):
        return None
    return _padded([[0.0] * len(r.prompt) + row for row, r in zip(rows, rollouts, strict=True)], 0.0)


def _check(index: int, rollout: Rollout) -> None:
    length, trained = len(rollout.response), _trained(rollout)
    if not rollout.prompt:
        raise ValueError(f"Rollout {index} has an empty prompt; its first response token would depend on nothing")
    if len(trained) != length:
        raise ValueError(f"Rollout {index} has {len(trained)} flags in `trained` for {length} response tokens")
    if True not in trained:
        raise ValueError(f"Rollout {index} has no response token to train on")
    if isinstance(rollout.score, list) and len(rollout.score) > length:
        raise ValueError(f"Rollout {index} has {len(rollout.score)} scores for {length} response tokens")


def _trained(rollout: Rollout) -> list[bool]:
    return [True] * len(rollout.response) if rollout.trained is None else rollout.trained


def _token_scores(rollout: Rollout) -> list[float]:
    """One score per response token."""
    scores = rollout.score
    if not isinstance(scores, list):
        last = max(index for index, is_trained in enumerate(_trained(rollout)) if is_trained)
        scores = [0.0] * last + [scores]
    return scores + [0.0] * (len(rollout.response) - len(scores))
