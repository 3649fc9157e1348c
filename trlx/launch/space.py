"""The YAML file of a sweep: what varies and how to search. It is checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trlx.optional import require
from trlx.strict import ConfigError, Section, build, suggestion
from trlx.yaml_files import read_yaml

SCHEDULERS = {
    "fifo": "fifo",
    "asha": "async_hyperband",
    "hyperband": "hyperband",
    "hyperbandforbohb": "hb_bohb",
    "pbt": "pbt",
}
"""Their names in ``ray.tune.create_scheduler``."""
REFUSED = {
    "bayesopt": ("grid", "choice", "randn", "qrandn"),
    "bohb": ("grid", "randn", "qrandn"),
    "optuna": ("grid", "randn", "qrandn", "qloguniform", "qlograndint"),
}
"""Strategies by which a search cannot choose, or whose q it would ignore."""
FIRST_SEED = 1000
"""Trial n has the seed FIRST_SEED + n, unless the sweep varies ``train.seed`` or the scheduler is pbt."""
RESERVED = ("train.checkpoint_dir", "train.logging_dir", "train.resume_from_checkpoint")
"""Settings that the sweep chooses for every trial."""
_KINDS = {
    "uniform": ("low", "high"),
    "loguniform": ("low", "high"),
    "randn": ("mean", "standard deviation"),
    "randint": ("low", "high"),
    "lograndint": ("low", "high"),
}
"""What the values of a strategy are. With the prefix q they end with q: what is drawn is rounded to its multiples."""
STRATEGIES = (*_KINDS, *(f"q{kind}" for kind in _KINDS), "choice", "grid")


@dataclass
class TuneConfig(Section):
    """The section ``tune_config`` of a sweep's file."""

    section = "tune_config"

    metric: str
    """Name in metrics.jsonl by which trials are judged, at every evaluation."""
    mode: str = "max"
    """max or min."""
    search_alg: str | None = "random"
    """random (which tries grids as well), optuna, bayesopt or bohb."""
    scheduler: str | None = "fifo"
    """fifo lets every trial run to its end; asha and the hyperbands end bad trials early; in pbt bad trials go
    on from checkpoints of good ones."""
    scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the scheduler's class in ``ray.tune.schedulers``."""
    num_samples: int = 1
    """Number of trials; with grids, how often each point of the grid is tried."""
    max_evaluations: int = 81
    """Evaluations of the best trials under asha and the hyperbands, with the one at step 0."""
    max_concurrent_trials: int | None = None
    """Trials at once; null: as many as the GPUs or CPUs allow."""
    time_budget_s: float | None = None
    """Seconds after which all trials end."""

    def check(self) -> None:
        self.search_alg, self.scheduler = self.search_alg or "random", self.scheduler or "fifo"
        self.require_choice("mode", ["max", "min"])
        self.require_choice("search_alg", ["random", *REFUSED])
        self.require_choice("scheduler", SCHEDULERS)
        self.require(self.num_samples >= 1, "num_samples", "be at least 1")
        self.require(self.max_evaluations >= 2, "max_evaluations", "be at least 2")
        paired = (self.search_alg == "bohb") == (self.scheduler == "hyperbandforbohb")
        self.require(paired, "scheduler", "be hyperbandforbohb with search_alg bohb, and with no other")
        alone = self.scheduler != "pbt" or self.search_alg == "random"
        self.require(alone, "search_alg", "be random with scheduler pbt, which draws new settings itself")


@dataclass(frozen=True)
class Parameter:
    """How the values of one setting are chosen. Strategies and their values are those of ``ray.tune``."""

    strategy: str
    values: tuple

    def domain(self) -> Any:
        """The strategy as an object of ``ray.tune``."""
        from ray import tune

        if self.strategy in ("choice", "grid"):
            return {"choice": tune.choice, "grid": tune.grid_search}[self.strategy](list(self.values))
        return getattr(tune, self.strategy)(*self.values)

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of numbers that `decode` turns into values: of logarithms for a logarithmic strategy."""
        low, high = self.values[:2]
        high += self.strategy == "qrandint"  # its values may reach `high`
        return (math.log(low), math.log(high)) if "log" in self.strategy else (low, high)

    def decode(self, number: float) -> Any:
        """The value for a number within `bounds`: its exponential, an integer or a multiple of q."""
        value = math.exp(number) if "log" in self.strategy else number
        return self.nearest(math.floor(value + 1e-9) if self.strategy.endswith("randint") else value)

    def nearest(self, value: Any) -> Any:
        """The allowed value next to `value`."""
        if self.strategy in ("choice", "grid"):
            return value
        low, high = self.values[:2]
        if self.strategy.startswith("q"):
            value = round(value / self.values[2]) * self.values[2]
        elif self.strategy.endswith("randint"):
            high -= 1
        return value if self.strategy.endswith("randn") else min(max(value, low), high)


@dataclass(frozen=True)
class Space:
    """A sweep's file: how to search, what varies, and the settings that are the same in all trials."""

    tune: TuneConfig
    varied: Mapping[str, Parameter]
    fixed: Mapping[str, Any]

    def drawn(self) -> list[dict[str, Any]]:
        """What a random search chooses for its trials: every point of the grids ``num_samples`` times."""
        from numpy.random import default_rng
        from ray.tune.search.variant_generator import generate_variants

        spec = {"config": {name: parameter.domain() for name, parameter in self.varied.items()}}
        rng = default_rng(0)  # as in `trlx.launch.sweep`
        rounds = range(self.tune.num_samples)
        return [variant["config"] for _ in rounds for _, variant in generate_variants(spec, random_state=rng)]

    def hparams(self, number: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a trial: its seed, those that all trials share, and those chosen for it."""
        # in pbt a trial goes on with what another began, which may be a model made with its seed
        seed = FIRST_SEED + (0 if self.tune.scheduler == "pbt" else number)
        return {"train.seed": seed, **self.fixed, **plain(chosen)}

    @property
    def num_trials(self) -> int:
        """How many trials there will be."""
        return self.tune.num_samples * math.prod(len(p.values) for p in self.varied.values() if p.strategy == "grid")

    @property
    def example(self) -> dict[str, Any]:
        """The settings of a trial that might be."""
        return self.hparams(0, {name: parameter.values[0] for name, parameter in self.varied.items()})


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
        raise ConfigError(f"{path} has no tune_config: write that section, with the metric that judges trials")
    tune = build(TuneConfig, entries.pop("tune_config"), "tune_config")
    parameters = {name: _parameter(name, entry) for name, entry in entries.items()}
    # a single value is kept out of the search, so that it may be a text where the search knows only numbers
    fixed = {name: p.values[0] for name, p in parameters.items() if len(p.values) == 1}
    varied = {name: p for name, p in parameters.items() if name not in fixed}
    _check_search(tune, varied)
    return Space(tune, varied, fixed)


def trials(config: Path) -> list[dict[str, Any]]:
    """The settings of every trial of a random or grid search, by dotted name. The same file gives the same trials.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the search or the scheduler needs results of trials.
        Others: see `read_space`.
    """
    space = read_space(config)
    require("ray", extra="sweep", purpose="A sweep")
    if (space.tune.search_alg, space.tune.scheduler) != ("random", "fifo"):
        raise ConfigError(
            f"{config} has search_alg {space.tune.search_alg} and scheduler {space.tune.scheduler}, which choose by "
            "results: write search_alg: random and scheduler: fifo, or run it with trlx sweep"
        )
    return [space.hparams(number, chosen) for number, chosen in enumerate(space.drawn())]


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Python's numbers instead of numpy's."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}


def _parameter(name: str, entry: Any) -> Parameter:
    if name in RESERVED:
        raise ConfigError(f"{name} cannot be swept: every trial gets a folder of its own; remove the entry")
    if not isinstance(entry, Mapping) or set(entry) != {"strategy", "values"}:
        example = "{strategy: uniform, values: [0, 1]}"
        raise ConfigError(f"{name} must have strategy and values, as in {example}; got {entry!r}")
    strategy, values = "grid" if entry["strategy"] == "grid_search" else entry["strategy"], entry["values"]
    if strategy not in STRATEGIES:
        near = suggestion(strategy, STRATEGIES)
        raise ConfigError(f"{name}: unknown strategy {strategy!r}.{near} Known: {', '.join(STRATEGIES)}")
    for holds, rule in _rules(strategy, values):
        if not holds:
            raise ConfigError(f"{name}: {rule}; got {values!r}")
    return Parameter(strategy, tuple(values))


def _rules(strategy: str, values: Any) -> Iterator[tuple[bool, str]]:
    """(Whether the values keep a rule, the rule). A rule is worked out only if those before it hold."""
    yield isinstance(values, list) and len(values) > 0, "values must be a list that is not empty"
    kind = strategy.removeprefix("q")
    if kind not in _KINDS:
        return
    names = [*_KINDS[kind], *(["q"] if kind != strategy else [])]
    optional = ", and the base of the logarithm if you like" if "log" in kind else ""
    yield 0 <= len(values) - len(names) <= bool(optional), f"{strategy} takes the values [{', '.join(names)}]{optional}"
    types, word = ((int,), "integers") if kind.endswith("randint") else ((int, float), "numbers")
    yield all(type(value) in types for value in values), f"the values of {strategy} must be {word}"
    yield kind == "randn" or values[0] < values[1], "low must be below high"
    yield "log" not in kind or values[0] > 0, f"low must be above 0 for {strategy}"
    yield kind == strategy or values[2] > 0, "q must be above 0"


def _check_search(tune: TuneConfig, varied: Mapping[str, Parameter]) -> None:
    """Refuses what searches and schedulers would complain about only after their first trials, or not at all."""
    if (tune.search_alg, tune.scheduler) == ("random", "fifo"):
        return
    if not varied and (tune.search_alg != "random" or tune.scheduler == "pbt"):
        what = f"search_alg {tune.search_alg}" if tune.search_alg != "random" else "scheduler pbt"
        raise ConfigError(f"{what} has nothing to search: no parameter has more than one value")
    for name, parameter in varied.items():
        if parameter.strategy in REFUSED.get(tune.search_alg, ()):
            raise ConfigError(
                f"{name}: search_alg {tune.search_alg} cannot choose by {parameter.strategy}: write uniform or "
                "loguniform with a low and a high value, or search_alg: random"
            )
        if tune.scheduler == "pbt":
            _check_change(name)


def _check_change(name: str) -> None:
    from trlx.run.changes import can_change  # loads torch

    if not can_change(name):
        raise ConfigError(
            f"{name} cannot change while a run goes on, and scheduler pbt changes it: write another scheduler, or one "
            "value with strategy choice"
        )
