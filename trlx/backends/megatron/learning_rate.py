"""Learning rate schedules with NeMo's and torch's names."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trlx.backends.megatron.nemo.file import Lookup
from trlx.strict import ConfigError, suggestion


class Schedule(ABC):
    """The learning rate of every optimizer step. Steps count from 0."""

    @abstractmethod
    def rate(self, step: int, peak_lr: float) -> float:
        """The learning rate of step `step`; `peak_lr` is the optimizer's ``lr``."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The optimizer's ``lr``, after a linear warm-up."""

    warmup_steps: int = 0

    def rate(self, step: int, peak_lr: float) -> float:
        """peak (step + 1) / (warmup + 1) up to step `warmup_steps`, then peak."""
        return peak_lr * _warmth(step, self.warmup_steps)


@dataclass(frozen=True)
class Annealing(Schedule):
    """Linear warm-up, then decay to `min_lr` until `constant_steps` before `max_steps`, then `min_lr`."""

    curve: str
    """"cosine" or "linear"."""
    max_steps: int
    warmup_steps: int = 0
    constant_steps: int = 0
    min_lr: float = 0.0

    def rate(self, step: int, peak_lr: float) -> float:
        """With p the progress of the decay: min + (peak - min) (1 + cos(pi p)) / 2, or min + (peak - min) (1 - p)."""
        if self.warmup_steps > 0 and step <= self.warmup_steps:
            return peak_lr * _warmth(step, self.warmup_steps)
        fallen, length = step - self.warmup_steps, self.max_steps - self.constant_steps - self.warmup_steps
        if fallen >= length:
            return self.min_lr
        return self.min_lr + (peak_lr - self.min_lr) * _CURVES[self.curve](fallen / length)


@dataclass(frozen=True)
class Ramp(Schedule):
    """torch's LinearLR: a factor that moves linearly from one value to another and stays there."""

    start_factor: float = 1 / 3
    end_factor: float = 1.0
    total_iters: int = 5

    def rate(self, step: int, peak_lr: float) -> float:
        """peak (start + (end - start) min(step, total) / total)."""
        done = min(step, self.total_iters) / self.total_iters
        return peak_lr * (self.start_factor + (self.end_factor - self.start_factor) * done)


def read_schedule(
    name: str, kwargs: Mapping[str, Any], *, where: str, total_steps: int | None, peak_lr: float
) -> Schedule:
    """The schedule called `name`, in any case.

    Args:
        where: the dotted key of `kwargs` in messages, e.g. ``"scheduler.kwargs"``.
        total_steps: the default of ``max_steps``; None: `kwargs` must have it.
        peak_lr: the optimizer's ``lr``, which must not be less than ``min_lr`` in NeMo's schedules.

    Raises:
        ConfigError: an unknown name or key, or a value out of range.
    """
    readers: dict[str, Callable[[], Schedule]] = {
        "CosineAnnealing": lambda: _annealing("cosine", lookup, total_steps, peak_lr),
        "WarmupAnnealing": lambda: _annealing("linear", lookup, total_steps, peak_lr),
        "WarmupPolicy": lambda: _constant(lookup),
        "cosine_annealing": lambda: _annealing("cosine", lookup, total_steps, math.inf),
        "linear": lambda: _ramp(lookup),
        "constant": lambda: _constant(lookup),
    }
    lookup = Lookup(kwargs, where)
    known = {key.lower(): reader for key, reader in readers.items()}
    if name.lower() not in known:
        near = suggestion(name, readers)
        raise ConfigError(f"{where}: unknown schedule {name!r}.{near} The NeMo trainers know: {', '.join(readers)}")
    return known[name.lower()]()


def _annealing(curve: str, lookup: Lookup, total_steps: int | None, peak_lr: float) -> Annealing:
    lookup.only("warmup_steps", "constant_steps", "max_steps", "T_max", "min_lr", "eta_min")
    end = lookup.either("max_steps", "T_max")
    if total_steps is None and not lookup.has(end):
        raise ConfigError(
            f"{lookup.where}.max_steps is missing: write the step at which the decay ends, as train.total_steps is null"
        )
    schedule = Annealing(
        curve=curve,
        max_steps=lookup.integer(end, total_steps, least=0),
        warmup_steps=lookup.integer("warmup_steps", 0, least=0),
        constant_steps=lookup.integer("constant_steps", 0, least=0),
        min_lr=lookup.number(lookup.either("min_lr", "eta_min"), 0.0, least=0),
    )
    if schedule.min_lr > peak_lr:
        raise ConfigError(
            f"{lookup.where}.min_lr is {schedule.min_lr}, more than the optimizer's lr {peak_lr}: write a smaller one"
        )
    return schedule


def _constant(lookup: Lookup) -> Constant:
    lookup.only("warmup_steps", "max_steps", "min_lr")
    return Constant(lookup.integer("warmup_steps", 0, least=0))


def _ramp(lookup: Lookup) -> Ramp:
    lookup.only("start_factor", "end_factor", "total_iters")
    return Ramp(
        lookup.number("start_factor", Ramp.start_factor, least=0),
        lookup.number("end_factor", Ramp.end_factor, least=0),
        lookup.integer("total_iters", Ramp.total_iters),
    )


def _warmth(step: int, warmup_steps: int) -> float:
    return min((step + 1) / (warmup_steps + 1), 1.0)


_CURVES = {"cosine": lambda part: (1 + math.cos(math.pi * part)) / 2, "linear": lambda part: 1 - part}
