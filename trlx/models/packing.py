"""Rows of a batch behind one another in one row of tokens, without padding: positions begin anew with every row."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trlx.models.architecture import Architecture, Causal, Scored
from trlx.models.decoder import probing, trunk

WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
"""Settings of a model whose attention does not reach back to the first token."""


def packed_states(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states [1, N, d] after each of the N tokens where `attention_mask` [B, T] is True, row after row."""
    positions = attention_mask.cumsum(dim=1) - 1
    return trunk(model)(
        tokens[attention_mask][None],
        position_ids=positions[attention_mask][None],
        # models make no mask of their own where one has four dimensions; `_attention` needs none
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device),
        row_lengths=attention_mask.sum(dim=1).tolist(),
        use_cache=False,
    )[0]


def why_unpackable(architecture: Architecture) -> str | None:
    """What the model does that packed rows do not fit; None if they fit. Reads two short rows in both ways."""
    model = architecture.model
    config = model.config.get_text_config()
    if type(architecture) not in (Causal, Scored):
        return "has an encoder or virtual tokens"
    if config._attn_implementation != "sdpa":
        return f"computes attention with {config._attn_implementation} and not with sdpa"
    if any(getattr(config, name, None) for name in WINDOWS):
        return "has attention in a window"
    if "position_ids" not in inspect.signature(trunk(model).forward).parameters:
        return "takes no position_ids"
    try:
        with probing(model) as tokens:
            mask = torch.ones_like(tokens).bool().expand(2, -1).clone()
            mask[0, -2:] = False
            rows = torch.cat([tokens, tokens.flip(1)])
            expected = architecture.states(rows, None, None)[mask]
            found = packed_states(model, rows, mask)[0]
    except Exception as error:  # models do all sorts of things with arguments that they do not know
        return f"does not take packed rows ({type(error).__name__})"
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
    return None if (found - expected).abs().max() <= tolerance else "has other hidden states in packed rows"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: list[int] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` attention; with `row_lengths`, of each packed row alone. All [B, heads, T, d]."""
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    rows = zip(*(each.split(row_lengths, dim=2) for each in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **settings)[0] for row in rows], dim=1), None


AttentionInterface.register("sdpa", _attention)  # changes nothing for calls without `row_lengths`
