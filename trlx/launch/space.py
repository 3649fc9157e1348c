"""What a sweep varies and how it looks for the best: its YAML file, checked before anything starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from trlx.config import read_yaml
from trlx.strict import ConfigError, Section, build, suggestion

SEARCHES = ("random", "bayesopt", "bohb")
SCHEDULERS = ("fifo", "hyperband", "hyperbandforbohb")
OWN_FOLDER = ("train.checkpoint_dir", "train.logging_dir", "train.resume_from_checkpoint")
"""Settings that the sweep itself makes for every trial."""


@dataclass
class TuneConfig(Section):
    """The section ``tune_config`` of a sweep's file."""

    section = "tune_config"

    metric: str
    """Name in metrics.jsonl that trials are judged by, at every evaluation."""
    mode: str = "max"
    """max or min."""
    search_alg: str | None = "random"
    """random (also over grids), bayesopt or bohb."""
    scheduler: str | None = "fifo"
    """fifo lets every trial run to its end; hyperband and hyperbandforbohb give the good ones more evaluations."""
    num_samples: int = 1
    """Trials; with grids, how often each point of them is tried."""
    max_evaluations: int = 81
    """For the hyperbands: evaluations that the best trials may have, the one before the first step included."""
    max_concurrent_trials: int | None = None
    """Trials at once; null: as many as there are GPUs or CPUs for."""
    time_budget_s: float | None = None
    """Seconds after which no trial goes on."""

    def check(self) -> None:
        self.search_alg, self.scheduler = self.search_alg or "random", self.scheduler or "fifo"
        self.require_choice("mode", ["max", "min"])
        self.require_choice("search_alg", SEARCHES)
        self.require_choice("scheduler", SCHEDULERS)
        self.require(self.num_samples >= 1, "num_samples", "be at least 1")
        self.require(self.max_evaluations >= 2, "max_evaluations", "be at least 2")
        paired = (self.search_alg == "bohb") == (self.scheduler == "hyperbandforbohb")
        self.require(paired, "scheduler", "be hyperbandforbohb with search_alg bohb, and with no other")


@dataclass(frozen=True)
class Parameter:
    """How the values of one setting are chosen; strategies and their values are those of ``ray.tune``.

    [q](uniform | loguniform | randint | lograndint): low, high[, q][, base of the logarithm, which changes nothing].
    Integers stay below high, with q they may reach it. [q]randn: mean, standard deviation[, q]. With q values are
    rounded to its multiples. choice: any values, drawn; grid: any values, all tried.
    """

    strategy: str
    values: tuple

    def draw(self, rng: Random) -> Any:
        """One value, drawn without ray."""
        if self.strategy == "choice":
            return rng.choice(self.values)
        return self.decode((rng.gauss if self._kind == "randn" else rng.uniform)(*self.bounds))

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of plain numbers that `decode` makes values of; mean and standard deviation for [q]randn."""
        low, high = self.values[:2]
        if self.strategy == "qrandint":
            high += 1  # its upper bound may be reached
        return (math.log(low), math.log(high)) if self._kind.startswith("log") else (low, high)

    def decode(self, number: float) -> Any:
        """The value that a number within `bounds` stands for: out of the logarithm, whole, rounded."""
        low, high = self.values[:2]
        quantized = self.strategy != self._kind
        value = math.exp(number) if self._kind.startswith("log") else number
        if self._kind.endswith("randint"):
            value = min(math.floor(value + 1e-9), high if quantized else high - 1)
        if quantized:
            value = round(value / self.values[2]) * self.values[2]
        return value if self._kind == "randn" else min(max(value, low), high)

    @property
    def _kind(self) -> str:
        return self.strategy.removeprefix("q")


@dataclass(frozen=True)
class Space:
    """A sweep's file: what varies, what is the same in all trials, and how to search."""

    tune: TuneConfig
    varied: Mapping[str, Parameter]
    fixed: Mapping[str, Any]

    def draws(self, rng: Random) -> Iterator[dict[str, Any]]:
        """The settings of all trials of a random search: every point of the grids ``num_samples`` times."""
        grids = {name: p.values for name, p in self.varied.items() if p.strategy == "grid"}
        for _ in range(self.tune.num_samples):
            for point in itertools.product(*grids.values()):
                chosen = dict(zip(grids, point, strict=True))
                yield {name: chosen[name] if name in chosen else p.draw(rng) for name, p in self.varied.items()}

    @property
    def num_trials(self) -> int:
        """How many trials there will be."""
        sizes = (len(p.values) for p in self.varied.values() if p.strategy == "grid")
        return self.tune.num_samples * math.prod(sizes)


def read_space(path: Path) -> Space:
    """Reads and checks a sweep's file.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: a key, a strategy, a search or a scheduler is unknown, or values do not fit their strategy.
    """
    if not path.is_file():
        other = path.with_suffix(".yaml" if path.suffix == ".yml" else ".yml")
        raise FileNotFoundError(f"there is no {path}" + (f"; did you mean {other}?" if other.is_file() else ""))
    entries = read_yaml(path)
    if "tune_config" not in entries:
        raise ConfigError(
            f"{path} has no tune_config, the section with metric, mode, search_alg, scheduler, num_samples"
        )
    tune = build(TuneConfig, entries.pop("tune_config"), "tune_config")
    parameters = {name: _parameter(name, entry) for name, entry in entries.items()}
    # one value is a setting: outside of the search even those algorithms take it that know only numbers
    fixed = {name: p.values[0] for name, p in parameters.items() if p.strategy in ("choice", "grid") and _is_one(p)}
    varied = {name: p for name, p in parameters.items() if name not in fixed}
    _check_search(tune, varied)
    return Space(tune, varied, fixed)


def _parameter(name: str, entry: Any) -> Parameter:
    if name in OWN_FOLDER:
        raise ConfigError(f"{name} cannot be swept: every trial gets a folder of its own; remove the entry")
    if not isinstance(entry, Mapping) or set(entry) != {"strategy", "values"}:
        raise ConfigError(
            f"{name} must have strategy and values, as in {{strategy: uniform, values: [0, 1]}}; got {entry!r}"
        )
    strategy = "grid" if entry["strategy"] == "grid_search" else entry["strategy"]
    if strategy not in STRATEGIES:
        near = suggestion(strategy, STRATEGIES)
        raise ConfigError(f"{name}: unknown strategy {strategy!r}.{near} Known: {', '.join(STRATEGIES)}")
    if not isinstance(entry["values"], list) or not entry["values"]:
        raise ConfigError(f"{name}: values must be a list that is not empty, got {entry['values']!r}")
    parameter = Parameter(strategy, tuple(entry["values"]))
    if strategy not in ("choice", "grid"):
        _check_numbers(name, parameter)
    return parameter


def _check_numbers(name: str, parameter: Parameter) -> None:
    strategy, values = parameter.strategy, parameter.values
    kind = strategy.removeprefix("q")
    names = ["mean", "standard deviation"] if kind == "randn" else ["low", "high"]
    names += ["q"] if strategy != kind else []
    most = len(names) + kind.startswith("log")
    if not len(names) <= len(values) <= most:
        optional = " and, if you like, base" if most > len(names) else ""
        raise ConfigError(f"{name}: {strategy} takes the values [{', '.join(names)}]{optional}; got {list(values)}")
    kinds = int if kind.endswith("randint") else (int, float)
    if not all(isinstance(value, kinds) and not isinstance(value, bool) for value in values):
        what = "integers" if kinds is int else "numbers"
        raise ConfigError(f"{name}: the values of {strategy} must be {what}, got {list(values)}")
    if kind != "randn" and not values[0] < values[1]:
        raise ConfigError(f"{name}: low must be below high, got {list(values)}")
    if kind.startswith("log") and values[0] <= 0:
        raise ConfigError(f"{name}: low must be above 0 for {strategy}, got {values[0]}")
    if strategy != kind and values[2] <= 0:
        raise ConfigError(f"{name}: q must be above 0, got {values[2]}")


def _check_search(tune: TuneConfig, varied: Mapping[str, Parameter]) -> None:
    """Refuses what a search could only complain about after its first trials."""
    if tune.search_alg == "random":
        return
    if not varied:
        raise ConfigError(f"search_alg {tune.search_alg} has nothing to search: no parameter has more than one value")
    refused = ("grid", "randn", "qrandn") + (("choice",) if tune.search_alg == "bayesopt" else ())
    for name, parameter in varied.items():
        if parameter.strategy in refused:
            raise ConfigError(
                f"{name}: search_alg {tune.search_alg} cannot choose by {parameter.strategy}: write uniform or "
                "loguniform with a low and a high value, or search_alg: random"
            )


def _is_one(parameter: Parameter) -> bool:
    return len(parameter.values) == 1


_KINDS = ("uniform", "loguniform", "randn", "randint", "lograndint")
STRATEGIES = (*_KINDS, *(f"q{kind}" for kind in _KINDS), "choice", "grid")
