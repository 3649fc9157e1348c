"""Rows of a batch behind one another in one row of tokens, without padding and with what they share only once."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trlx.models.architecture import Architecture, Causal, Scored
from trlx.models.decoder import probing, trunk

SHARED = 8
"""The fewest tokens of a beginning for which it pays that rows share it."""
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
"""Settings of a model whose attention does not reach back to the first token."""


@dataclass(frozen=True)
class Packed:
    """Where the tokens of rows stand behind one another. A beginning that rows share stands there once."""

    at: Tensor
    """[N], the place of each packed token in the flattened [B, T]."""
    places: Tensor
    """[B, T], the place of each token among the N; that of any token for padding."""
    keys: Tensor
    """[K], the places of all tokens of each row, row after row; not of rows that another row begins with."""
    rows: list[tuple[int, int, int]]
    """These rows, in the order of their tokens: (number of rows, tokens of each that stand there, tokens of each)."""

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`."""
        at, places, keys = (x.to(device, non_blocking=True) for x in (self.at, self.places, self.keys))
        return Packed(at, places, keys, self.rows)


def packed(tokens: Tensor, attention_mask: Tensor) -> Packed:
    """Where the tokens of [B, T], right-padded where `attention_mask` is False, stand when they are packed.

    The samples of a prompt, the answers of a pair, and all rows with one system prompt share a beginning. One of fewer
    than `SHARED` tokens stands there for each row, but a row that begins another one, or equals it, adds nothing. Both
    tensors are on the host: this looks at each token.
    """
    width, lengths = tokens.shape[1], attention_mask.sum(dim=1).tolist()
    # a tree of all beginnings: by the next token, where it stands in [B, T], and what may follow it
    tree: dict[int, tuple[int, dict]] = {}
    found: list[list[int]] = []
    alike: dict[tuple[int, int], list[int]] = {}
    for row, (ids, length) in enumerate(zip(tokens.tolist(), lengths, strict=True)):
        known, node, own = [], tree, range(row * width, row * width + length)
        for token in ids[:length]:
            if token not in node:
                break
            place, node = node[token]
            known.append(place)
        shared = len(known) if len(known) >= min(SHARED, length) else 0
        found.append([*known[:shared], *own[shared:]])
        for token, place in zip(ids[len(known) : length], own[len(known) :], strict=True):
            node[token] = place, {}
            node = node[token][1]
        if shared < length:
            alike.setdefault((length - shared, length), []).append(row)
    at = [place for (own, _), rows in alike.items() for row in rows for place in found[row][-own:]]
    number = torch.zeros(tokens.numel(), dtype=torch.long)
    number[at] = torch.arange(len(at))
    keys = number[[place for rows in alike.values() for row in rows for place in found[row]]]
    places = number[torch.tensor([each + [0] * (width - len(each)) for each in found])]
    return Packed(torch.tensor(at), places, keys, [(len(rows), *counts) for counts, rows in alike.items()])


def packed_states(model: PreTrainedModel, tokens: Tensor, rows: Packed) -> Tensor:
    """Hidden states [1, N, d] after each of the N packed tokens of [B, T]."""
    columns = rows.at % tokens.shape[1]
    return trunk(model)(
        tokens.flatten()[rows.at][None],
        position_ids=columns[None],
        # models make no mask of their own where one has four dimensions; `_attention` needs none
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device),
        packed_rows=rows,
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
            where = packed(rows.cpu(), mask.cpu()).to(rows.device)
            found = packed_states(model, rows, where)[0][where.places[mask]]
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
    packed_rows: Packed | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` attention; with `packed_rows`, of each row alone, and of rows with equally many tokens in
    one call. All [B, heads, T, d]."""
    if packed_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    found, start = [], 0
    each = packed_rows.keys.split([count * length for count, _, length in packed_rows.rows])
    for (count, own, length), places in zip(packed_rows.rows, each, strict=True):
        part, mask = slice(start, start + count * own), None
        start = part.stop
        keys, values = key[:, :, part], value[:, :, part]
        if length > own:
            keys, values = (whole.index_select(2, places) for whole in (key, value))
            mask = torch.ones(own, length, dtype=torch.bool, device=key.device).tril(length - own)[None, None]
        apart = (_apart(states, count) for states in (query[:, :, part], keys, values))
        found.append(sdpa_attention_forward(module, *apart, mask, **settings)[0].flatten(0, 1)[None])
    return torch.cat(found, dim=1), None


def _apart(states: Tensor, count: int) -> Tensor:
    """[1, heads, count * t, d] as [count, heads, t, d]."""
    return states[0].unflatten(1, (count, -1)).transpose(0, 1)


AttentionInterface.register("sdpa", _attention)  # changes nothing for calls without `packed_rows`
