"""Statistics over the True entries of a mask, and metrics that can be added over microbatches and processes.

A metric is a pair ``(sum, count)``, reported as their quotient, or a `Spread`, reported as mean, std, min and max.
Both can be merged, so parts of a batch, of any size, give the statistics of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """What mean, std, min and max of a set of numbers are computed from; 0-d tensors. Empty: 0, 0, 0, inf, -inf."""

    count: Tensor
    sum: Tensor
    squares: Tensor
    """Sum of squares, in float64, because the std is the difference of two large numbers."""
    min: Tensor
    max: Tensor


Metrics = dict[str, tuple[Tensor, Tensor] | Spread]
"""By name, a pair (sum, count) or a `Spread`."""


def mean_of(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The pair (sum, count) over entries of `x` where `mask` is True (None: all of them), without gradient."""
    x = x.detach()
    if mask is None:
        return x.sum(dtype=torch.float64), x.new_full((), x.numel(), dtype=torch.float64)
    assert x.shape == mask.shape
    return torch.where(mask, x, 0).sum(dtype=torch.float64), mask.sum(dtype=torch.float64)


def means_of(columns: dict[str, Tensor]) -> Metrics:
    """`mean_of` for any number of vectors [N], in three operations."""
    stacked = torch.stack([column.detach() for column in columns.values()])
    count = stacked.new_full((), stacked.shape[1], dtype=torch.float64)
    sums = stacked.sum(dim=1, dtype=torch.float64).unbind()
    return {name: (total, count) for name, total in zip(columns, sums, strict=True)}


def spread_of(x: Tensor, mask: Tensor | None = None) -> Spread:
    """The `Spread` of entries of `x` where `mask` is True (None: all of them), without gradient."""
    x = _chosen(x, mask).flatten().double()
    count = x.new_full((), x.numel())
    if x.numel() == 0:
        return Spread(count, count, count, x.new_full((), math.inf), x.new_full((), -math.inf))
    return Spread(count, x.sum(), x.dot(x), *x.aminmax())


def histogram_of(x: Tensor, bins: int = 24) -> dict[str, Any]:
    """How the entries of `x` are spread: "counts" in `bins` equal parts of the range from "low" to "high".

    If all are equal there is one bin. Numbers that are not finite are left out.
    """
    x = x.detach().double()[x.isfinite()]
    low, high = x.aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    counts = torch.histc(x, bins, low, high) if low < high else torch.tensor([x.numel()])
    return {"low": float(low), "high": float(high), "counts": counts.long().tolist()}


@torch.no_grad()
def pack(metrics: Metrics) -> tuple[list[str], Tensor]:
    """Names and one float64 tensor [M, 5] with rows (count, sum, squares, min, max), to add up or send at once.

    A pair gets the min and max of an empty set, so `finish` can distinguish it from a `Spread`.
    """
    if not metrics:
        return [], torch.zeros(0, 5, dtype=torch.float64)
    device = next(iter(metrics.values()))[0].device
    empty = [torch.full((), x, dtype=torch.float64, device=device) for x in (0.0, math.inf, -math.inf)]
    rows = [entry if isinstance(entry, Spread) else (entry[1], entry[0], *empty) for entry in metrics.values()]
    return list(metrics), torch.stack([x.double() for row in rows for x in row]).view(-1, 5)


def merge_packed(pieces: Tensor) -> Tensor:
    """Merges P packed pieces [P, M, 5] into one [M, 5]: adds the sums, compares min and max."""
    assert pieces.ndim == 3
    sums, low, high = pieces.split([3, 1, 1], dim=-1)
    return torch.cat([sums.sum(dim=0), low.amin(dim=0), high.amax(dim=0)], dim=-1)


def finish(names: Sequence[str], packed: Tensor) -> dict[str, float]:
    """The numbers to report from a packed tensor [M, 5].

    A pair "loss" becomes ``loss``; a Spread "values" becomes ``values/mean``, ``values/std`` (unbiased, 0 for a single
    entry), ``values/min`` and ``values/max``. Metrics with a count of 0 are left out.
    """
    numbers = {}
    for name, (count, total, squares, low, high) in zip(names, packed.tolist(), strict=True):
        if count == 0:
            continue
        mean = total / count
        if low > high:
            numbers[name] = mean
        else:
            std = _unbiased_std(squares - total * mean, count)
            numbers |= {f"{name}/mean": mean, f"{name}/std": std, f"{name}/min": low, f"{name}/max": high}
    return numbers


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over entries where `mask` is True; 0 elsewhere.

    The variance is the population's, so a single entry becomes 0, and repeating a batch changes nothing.
    """
    assert x.shape == mask.shape
    chosen = x[mask].double()
    count = max(chosen.numel(), 1)
    mean = chosen.sum() / count
    variance = (chosen - mean).square().sum() / count
    white = torch.zeros_like(x)
    white[mask] = ((chosen - mean) / (variance + 1e-8).sqrt()).to(x.dtype)
    return white


@dataclass
class RunningMoments:
    """Mean and standard deviation of all numbers seen so far, merged batch by batch (Chan, Golub and LeVeque, 1979)."""

    mean: float = 0.0
    count: int = 0
    deviations: float = 0.0
    """Sum of (x - mean)^2."""

    @property
    def std(self) -> float:
        """Unbiased; 0 until there are two numbers."""
        return _unbiased_std(self.deviations, self.count)

    def update(self, x: Tensor | Sequence[float]) -> tuple[float, float]:
        """Adds one global batch of at least one number. Returns the mean and unbiased std of `x` alone."""
        x = torch.as_tensor(x, dtype=torch.float64).flatten()
        count, mean = x.numel(), float(x.mean())
        deviations = float((x - mean).square().sum())
        total, shift = self.count + count, mean - self.mean
        self.deviations += deviations + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total
        return mean, _unbiased_std(deviations, count)

    def state_dict(self) -> dict[str, float]:
        """Everything `load_state_dict` needs to go on from here."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores what `state_dict` returned."""
        self.mean, self.count, self.deviations = state["mean"], int(state["count"]), state["deviations"]


def _chosen(x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is None or x.shape == mask.shape
    return x.detach() if mask is None else x.detach()[mask]


def _unbiased_std(deviations: float, count: float) -> float:
    # rounding can give a tiny negative number; max in this order returns a NaN instead of hiding it
    return math.sqrt(max(deviations, 0.0) / (count - 1)) if count > 1 else 0.0
