"""Reads rows token by token: keys and values of what was read are kept, and dropped with the rows that end."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trlx.data.collate import left_pad
from trlx.models.decoder import probing, trunk

ROOM = 64
"""Columns that a cache has free after it has grown, so that not every token copies all those before it."""
PADDING = 0.25
"""The largest share of padding in a group of prompts that are read together."""


class Reader:
    """Reads `prompts` and then, with every `step`, one more token of each row that is held.

    Equal prompts are read once, and prompts of other lengths in other groups. `order` says which prompt each row of the
    hidden states is.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]], device: torch.device | str):
        self.trunk, self.device = trunk(model), device
        self.takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(tuple(prompt), []).append(row)
        distinct = sorted(rows, key=len, reverse=True)
        self.order = [row for prompt in distinct for row in rows[prompt]]
        self.lengths = [len(prompts[row]) for row in self.order]
        read = [self._read(group) for group in _groups(distinct)]
        copies = torch.tensor([len(rows[prompt]) for prompt in distinct], device=device)
        self.hidden = torch.cat([hidden for hidden, *_ in read]).repeat_interleave(copies, 0)
        """[B, d], the hidden state after the last token of each row."""
        self.real = _joined([real for _, real, _ in read], 1).repeat_interleave(copies, 0)
        self.cache = DynamicCache()
        while read[0][-1].layers:  # taken one by one, so that memory never holds the whole cache twice
            layers = [cache.layers.pop(0) for *_, cache in read]
            joined = (_joined([getattr(layer, name) for layer in layers], 2) for name in ("keys", "values"))
            self.cache.layers.append(_Layer(*(each.repeat_interleave(copies, 0) for each in joined)))

    def step(self, tokens: Tensor) -> None:
        """Reads one token [B] of each row that is held, and sets `hidden`."""
        self.lengths = [length + 1 for length in self.lengths]
        self.real = F.pad(self.real, (0, 1), value=1)
        self.hidden = self._states(tokens[:, None], self.real, self.cache)

    def keep(self, at: list[int]) -> None:
        """Drops all rows but those `at` these places, and the columns in which the others have only padding."""
        self.lengths = [self.lengths[i] for i in at]
        first = self.real.shape[1] - max(self.lengths)
        index = torch.tensor(at, device=self.device)
        self.real = self.real[index, first:]
        for layer in self.cache.layers:
            layer.keep(index, first)

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor, DynamicCache]:
        tokens, real = (each.to(self.device) for each in left_pad([list(prompt) for prompt in prompts], 0))
        cache = DynamicCache()
        return self._states(tokens, real, cache), real, cache

    def _states(self, tokens: Tensor, real: Tensor, cache: DynamicCache) -> Tensor:
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        named = {"position_ids": positions} if self.takes_positions else {}
        return self.trunk(tokens, attention_mask=real, past_key_values=cache, use_cache=True, **named)[0][:, -1]


def why_unreadable(model: PreTrainedModel, device: torch.device | str) -> str | None:
    """What the model does that `Reader` does not fit; None if it fits. Reads a few tokens with a cache and without."""
    if type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return "prepares its inputs in its own way"
    try:
        layers = DynamicCache(config=model.config).layers
        if {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
            return "keeps more than keys and values"
        with probing(model) as tokens:
            fits = all(_same(*pair) for pair in _both_ways(model, tokens[0].tolist(), device))
    except Exception as error:  # models do all sorts of things with a cache that they do not know
        return f"does not take a cache of tokens ({type(error).__name__})"
    return None if fits else "has other hidden states with a cache"


def _both_ways(model: PreTrainedModel, ids: list[int], device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states with a cache and without: after prompts of two lengths, after a token, and after one row ended."""
    rows = [ids[:3], ids[1:2]]
    reader = Reader(model, rows, device)
    for kept in ([0, 1], [1], []):
        states = [trunk(model)(torch.tensor([row], device=device), use_cache=False)[0][:, -1] for row in rows]
        yield reader.hidden, torch.cat(states)
        rows = [[*rows[i], ids[-1]] for i in kept]
        if rows:
            reader.keep(kept)
            reader.step(torch.tensor([row[-1] for row in rows], device=device))


def _same(found: Tensor, expected: Tensor) -> bool:
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
    return bool((found - expected).abs().max() <= tolerance)


class _Layer(DynamicLayer):
    """The keys and values [B, heads, T, d] of one block, with room for more columns."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = self.room = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self.room[0].shape[2]:
            self.room = tuple(F.pad(each, (0, 0, 0, end - start + ROOM)) for each in (self.keys, self.values))
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def keep(self, rows: Tensor, first: int) -> None:
        """Drops all other rows, and the columns before `first`."""
        self.keys, self.values = self.room = tuple(each[rows][:, :, first:] for each in (self.keys, self.values))


def _groups(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive groups of prompts, longest first, with little padding."""
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        tokens = sum(map(len, group)) + len(prompt)
        if group and tokens < (1 - PADDING) * (len(group) + 1) * len(group[0]):
            yield group
            group = []
        group.append(prompt)
    yield group


def _joined(parts: Sequence[Tensor], columns: int) -> Tensor:
    """The rows of all parts, which end in one column; the first part is the widest."""
    width, after = parts[0].shape[columns], parts[0].ndim - columns - 1
    return torch.cat([F.pad(each, (*[0, 0] * after, width - each.shape[columns], 0)) for each in parts])
