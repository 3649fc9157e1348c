"""Rows of a batch behind one another in one row of tokens, without padding and with what they share only once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trlx.models.architecture import COSTLY, Architecture, Causal, Scored
from trlx.models.decoder import probing, trunk

varlen_attn = None
if torch.__version__ >= (2, 13):  # earlier ones do not have all of its arguments
    from torch.nn.attention.varlen import varlen_attn

    COSTLY.append(torch.ops.torch_attn._varlen_attn.default)

SHARED = 8
"""The fewest tokens of a beginning for which it pays that rows share it."""
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
"""Settings of a model whose attention does not reach back to the first token."""
ONLY_SDPA = ("is_causal", "position_bias", "cache", "softcap")
"""Arguments of transformers' attention that ``varlen_attn`` does not have."""


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
    ends: Tensor
    """int32 [2, 1 + number of these rows], 0 and where each of them ends, among the N and among the K."""
    longest: tuple[int, int]
    """The most tokens of one of them, among the N and among the K."""

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()})


def packed(tokens: Tensor, attention_mask: Tensor, shares: bool = True) -> Packed:
    """Where the tokens of [B, T], right-padded where `attention_mask` is False, stand when they are packed.

    The samples of a prompt, the answers of a pair, and all rows with one system prompt share a beginning. One of fewer
    than `SHARED` tokens stands there for each row, but a row that begins another one, or equals it, adds nothing. Both
    tensors are on the host: this looks at each token. Without `shares` all tokens of each row stand there.
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
        shared = len(known) if shares and len(known) >= min(SHARED, length) else 0
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
    counts = list(zip(*(counts for counts, rows in alike.items() for _ in rows), strict=True))
    ends = torch.tensor([[0, *accumulate(each)] for each in counts], dtype=torch.int32)
    groups = [(len(rows), *counts) for counts, rows in alike.items()]
    return Packed(torch.tensor(at), places, keys, groups, ends, (max(counts[0]), max(counts[1])))


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
    """What the model does that packed rows do not fit; None if they fit. Reads three short rows in both ways."""
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
            row = tokens.repeat(1, SHARED)[:, : SHARED + 4]
            rows = torch.cat([row, row, row.flip(1)])
            mask = torch.ones_like(rows, dtype=torch.bool)
            mask[0, -2:] = False  # so that the second row begins as the first does, and has two tokens more
            expected = architecture.states(rows, None, None)[mask]
            where = packed(rows.cpu(), mask.cpu()).to(rows.device)
            found = packed_states(model, rows, where)[0][where.places[mask]]
    except Exception as error:  # models do all sorts of things with arguments that they do not know
        return f"does not take packed rows ({type(error).__name__})"
    tolerance = torch.finfo(_precision(expected)).eps ** 0.5 * expected.abs().max()
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
    """transformers' ``sdpa`` attention; with `packed_rows`, of each row alone. All [B, heads, T, d]."""
    if packed_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    dtype = _precision(query)
    kernel = kernel_for(query.device, dtype, query.shape[-1])
    asks_more = settings.get("dropout") or any(settings.get(name) is not None for name in ONLY_SDPA)
    if kernel is None or asks_more or value.shape[-1] != query.shape[-1]:
        return _by_length(module, query, key, value, packed_rows, **settings), None
    queries, keys, values = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    if len(packed_rows.keys) > len(keys):
        keys, values = (states.index_select(0, packed_rows.keys) for states in (keys, values))
    causal = {"scale": settings.get("scaling"), "window_size": (-1, 0)}
    grouped = keys.shape[1] != queries.shape[1]
    found = kernel(queries, keys, values, *packed_rows.ends, *packed_rows.longest, **causal, enable_gqa=grouped)
    return found[None], None


def kernel_for(device: torch.device, dtype: torch.dtype, width: int) -> Callable[..., Tensor] | None:
    """torch's attention of rows behind one another, if it takes heads of `width` numbers of `dtype` on `device`."""
    fits = dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    if device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= (8, 0):
        return varlen_attn
    return None


def _precision(states: Tensor) -> torch.dtype:
    """The dtype in which attention of `states` is computed."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _by_length(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed_rows: Packed, **settings: Any
) -> Tensor:
    """Attention [1, N, heads, d] with one call of ``sdpa`` for all rows that have equally many tokens."""
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
    return torch.cat(found, dim=1)


def _apart(states: Tensor, count: int) -> Tensor:
    """[1, heads, count * t, d] as [count, heads, t, d]."""
    return states[0].unflatten(1, (count, -1)).transpose(0, 1)


AttentionInterface.register("sdpa", _attention)  # changes nothing for calls without `packed_rows`
