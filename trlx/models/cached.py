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

ROOM = 16
"""Columns that a cache has free after it has grown, so that not every token copies all those before it."""
PADDING = 0.25
"""The largest share of padding in a group of prompts that are read together."""


class Reader:
    """Reads prompts and then, with every `step`, one more token of each row that is held."""

    def __init__(self, model: PreTrainedModel, device: torch.device | str):
        self.trunk, self.device = trunk(model), device
        self.takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters
        self.lengths: list[int] = []
        """The number of tokens of each row."""
        self.real = torch.empty(0, 0, dtype=torch.int64, device=device)
        """[B, T], 1 for the tokens of each row, 0 for the padding before them."""
        self.hidden: Tensor | None = None
        """[B, d], the hidden state after the last token of each row."""
        self.cache = DynamicCache()

    def join(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> None:
        """Reads `prompts`, longest first, those of about one length together. Each makes as many new rows as `copies`
        says, behind the rows that are held."""
        counts, read = iter(copies), []
        for group in _groups(prompts):
            rows = [row for row in range(len(group)) for _ in range(next(counts))]
            self.lengths += [len(group[row]) for row in rows]
            read.append((torch.tensor(rows, device=self.device), *self._read(group)))
        width = max(self.real.shape[1], len(prompts[0]))
        hidden = [hidden[rows] for rows, hidden, *_ in read]
        self.hidden = torch.cat(hidden if self.hidden is None else [self.hidden, *hidden])
        self.real = _ending_together([self.real, *(real[rows] for rows, _, real, _ in read)], 1, width)
        held, self.cache = self.cache.layers, DynamicCache()
        while read[0][-1].layers:  # taken one by one, so that memory never holds the whole cache twice
            pairs = [(layer.keys, layer.values) for layer in held[:1]]
            for rows, *_, cache in read:
                layer = cache.layers.pop(0)
                pairs.append((layer.keys[rows], layer.values[rows]))
            del held[:1]
            self.cache.layers.append(
                _Layer(*(_ending_together(each, 2, width, ROOM) for each in zip(*pairs, strict=True)), width)
            )

    def step(self, tokens: Tensor) -> None:
        """Reads one token [B] of each row that is held, and sets `hidden`."""
        self.lengths = [length + 1 for length in self.lengths]
        self.real = F.pad(self.real, (0, 1), value=1)
        self.hidden = self._states(tokens[:, None], self.real, self.cache)

    def drop(self, ended: Sequence[int]) -> list[int]:
        """Drops the rows at these places, and columns in which the others have only padding. The last rows move to the
        places that become free. Returns where each row was before."""
        came = list(range(len(self.lengths) - len(ended)))
        free = [at for at in ended if at < len(came)]
        moved = sorted(set(range(len(came), len(self.lengths))).difference(ended))
        for to, at in zip(free, moved, strict=True):
            came[to] = at
        self.lengths = [self.lengths[at] for at in came]
        first = self.real.shape[1] - max(self.lengths, default=0)
        to, at, rows = (torch.tensor(each, dtype=torch.int64, device=self.device) for each in (free, moved, came))
        self.real, self.hidden = self.real[rows, first:], self.hidden[rows]
        for layer in self.cache.layers:
            layer.drop(to, at, len(came), first)
        return came

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, DynamicCache]:
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
    reader = Reader(model, device)
    reader.join(rows, [1, 1])
    for ended in ([], [0], [0]):
        states = [trunk(model)(torch.tensor([row], device=device), use_cache=False)[0][:, -1] for row in rows]
        yield reader.hidden, torch.cat(states)
        rows = [[*rows[at], ids[-1]] for at in reader.drop(ended)]
        if rows:
            reader.step(torch.tensor([row[-1] for row in rows], device=device))


def _same(found: Tensor, expected: Tensor) -> bool:
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
    return bool((found - expected).abs().max() <= tolerance)


class _Layer(DynamicLayer):
    """The keys and values [B, heads, T, d] of one block, with room for more columns."""

    def __init__(self, keys: Tensor, values: Tensor, width: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.room = keys, values
        self._show(width)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self.room[0].shape[2]:
            self.room = tuple(F.pad(each, (0, 0, 0, end - start + ROOM)) for each in (self.keys, self.values))
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def drop(self, to: Tensor, at: Tensor, count: int, first: int) -> None:
        """Moves the rows `at` some places `to` others, and keeps `count` rows, without the columns before `first`."""
        if len(to):
            for room in self.room:
                room[to] = room[at]
        end = self.keys.shape[2] - first
        self.room = tuple(room[:count, :, first:] for room in self.room)
        self._show(end)

    def _show(self, end: int) -> None:
        self.keys, self.values = (room[:, :, :end] for room in self.room)


def _groups(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Consecutive groups of prompts, longest first, with little padding."""
    group: list[Sequence[int]] = []
    for prompt in prompts:
        tokens = sum(map(len, group)) + len(prompt)
        if group and tokens < (1 - PADDING) * (len(group) + 1) * len(group[0]):
            yield group
            group = []
        group.append(prompt)
    yield group


def _ending_together(parts: Sequence[Tensor], columns: int, width: int, free: int = 0) -> Tensor:
    """The rows of all parts. Their columns, a dimension, end at `width`, and `free` ones follow."""
    shape = list(parts[0].shape)
    shape[0], shape[columns] = sum(map(len, parts)), width + free
    whole, row = parts[0].new_zeros(shape), 0
    for part in parts:
        count = part.shape[columns]
        whole[row : row + len(part)].narrow(columns, width - count, count).copy_(part)
        row += len(part)
    return whole
