"""Evaluation: samples the evaluation prompts, scores the samples, and reports means and a table."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from trlx.backends.base import Backend, LossFn
from trlx.backends.interrupts import interruptible, leave_if_asked
from trlx.batch import Rollout, Sample, TokenBatch, TokenOutputs
from trlx.data.prompts import Prompt
from trlx.data.store import RolloutStore, own_rows, shard
from trlx.methods.masked import finish, merge_packed, pack
from trlx.rewards.calling import Arguments
from trlx.rewards.results import means, total
from trlx.rewards.scoring import Metric, Scorer
from trlx.run.display import Display
from trlx.sampling.settings import SamplingConfig

ROWS_AT_ONCE = 1024
"""Rows that a process gives the model at once; with sharded weights, each time gathers them."""


@dataclass(slots=True)
class EvaluationResult:
    """Means by name, and the table of samples."""

    metrics: dict[str, float] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)

    def objective(self, best_by: tuple[str, ...]) -> tuple[str, float | None]:
        """What `best_checkpoint` maximises: the first of these metrics that is there, and its highest value."""
        for name in best_by:
            found = [value for key, value in self.metrics.items() if key.split("@")[0] == name]
            if found:
                return name, max(found)
        return "", None


def lengths(rollouts: list[Rollout]) -> dict[str, float]:
    """The mean of the responses' tokens, and the share of responses that ended by eos or a stop sequence."""
    return {
        "response_length": sum(len(rollout.response) for rollout in rollouts) / len(rollouts),
        "ended": sum(rollout.ended for rollout in rollouts) / len(rollouts),
    }


def means_over(backend: Backend, store: RolloutStore, loss: LossFn, together: int) -> dict[str, float]:
    """The metrics of `loss` over all rows of `store`, without an update. Call it on every process.

    `loss` may read nothing but log-probabilities from the model's outputs, as `Backend.evaluate` gives no more. Blocks
    of `together` rows are never split.

    Raises:
        Interrupted: a signal asked the run to leave.
    """
    found = []
    for batch, outputs in evaluated(backend, store, together):
        names, packed = pack(loss(outputs, batch)[1])
        found.append(packed)
    return finish(names, merge_packed(torch.stack(backend.gather_objects(found))))


def evaluated(backend: Backend, store: RolloutStore, together: int) -> Iterator[tuple[TokenBatch, TokenOutputs]]:
    """This process's share of `store`, a part at a time, and what the model says about it.

    The processes share blocks of `together` rows. Iterate to the end on every process.
    """
    size = ROWS_AT_ONCE * backend.data_size
    for first in range(0, len(store), size):
        leave_if_asked(backend)
        rows = list(range(first, min(first + size, len(store))))
        batch = shard(store, rows, backend.data_rank, backend.data_size, together)
        yield batch, backend.evaluate(batch)


@dataclass(slots=True)
class Evaluator:
    """Evaluates with each value of the generation argument that the config sweeps over, if it sweeps over one."""

    backend: Backend
    draw: Callable[[list[list[int]], SamplingConfig], list[Sample]]
    """See `Sampler.generate`."""
    tokenizer: Any
    prompts: list[Prompt]
    variants: list[tuple[str, SamplingConfig]]
    """("", settings), or ("@beta=1", settings) for each value of a swept argument."""
    batch_size: int
    """Prompts generated at once on each process."""
    scorer: Scorer | None
    metric_fn: Callable[..., Any] | None
    display: Display
    held_out: Callable[[], dict[str, float]] | None = None
    """Returns means over samples that are not trained on, see `means_over`; logged as ``eval/<name>``."""
    _metric: Metric | None = field(init=False)

    def __post_init__(self):
        self.tokenizer = copy.deepcopy(self.tokenizer)  # metric_fn may change it
        self._metric = Metric(self.metric_fn) if self.metric_fn is not None else None
        for function in filter(None, (self.scorer, self._metric)):
            function.check(self.prompts[0].metadata)

    def run(self, step: int = 0) -> EvaluationResult:
        """Call it on every process; each gets the same result. reward_fn and metric_fn get `step`.

        Raises:
            RewardError: reward_fn or metric_fn failed, or did not return one number per sample.
            Interrupted: a signal asked the run to leave.
        """
        result = EvaluationResult()
        for suffix, sampling in self.variants:
            began = time.perf_counter()
            rollouts = self._sample(sampling)
            generated = time.perf_counter()
            columns, rows, averages = self.backend.on_main(partial(self._judge, rollouts, step))
            result.metrics |= {f"{name}{suffix}": value for name, value in averages.items()}
            result.metrics["time/generate"] = result.metrics.get("time/generate", 0.0) + generated - began
            result.metrics["time/metric"] = result.metrics.get("time/metric", 0.0) + time.perf_counter() - generated
            argument, _, value = suffix.removeprefix("@").partition("=")
            result.columns = [argument, *columns] if suffix else columns
            result.rows += [[value, *row] if suffix else row for row in rows]
        held_out = {} if self.held_out is None else self.held_out()
        result.metrics |= {f"eval/{name}": mean for name, mean in held_out.items()}
        return result

    def _sample(self, sampling: SamplingConfig) -> list[Rollout]:
        """One rollout per prompt, generated in parallel, gathered in the order of the prompts."""
        rows = own_rows(len(self.prompts), self.backend.data_rank, self.backend.data_size)
        mine = self.prompts[rows]
        rollouts = []
        # every process calls `draw` equally often, even with no prompts left: it gathers sharded weights
        for start in range(0, rows.stop - rows.start, self.batch_size):
            leave_if_asked(self.backend)
            self.display.working(f"evaluating {start * self.backend.data_size}/{len(self.prompts)}")
            prompts = mine[start : start + self.batch_size]
            drawn = self.draw([prompt.ids for prompt in prompts], sampling)
            rollouts += [sampling.rollout(*pair) for pair in zip(prompts, drawn, strict=True)]
        return self.backend.gather_objects(rollouts)

    @interruptible()
    def _judge(self, rollouts: list[Rollout], step: int) -> tuple[list[str], list[list[Any]], dict[str, float]]:
        """Table columns, table rows and means of one setting."""
        asked = Arguments(rollouts, self.tokenizer, step, self.backend.row_format.separator)
        table: dict[str, list[Any]] = {"prompt": asked.offered["prompts"], "output": asked.offered["outputs"]}
        averages: dict[str, float] = {}
        if self.scorer is not None:
            scores = self.scorer.score(rollouts, step)
            table["reward"] = [total(scored.score) for scored in scores]
            averages["reward/mean"] = _mean(table["reward"])
            for name, mean in means(scored.parts for scored in scores).items():
                table[f"reward/{name}"] = [scored.parts[name] for scored in scores]
                averages[f"reward/{name}"] = mean
        if self._metric is not None:
            for name, values in self._metric(asked).items():
                if isinstance(values, list):
                    table[name] = values
                averages[f"metrics/{name}"] = _mean(values) if isinstance(values, list) else values
        averages |= {f"eval/{name}": mean for name, mean in lengths(rollouts).items()}
        return list(table), [list(row) for row in zip(*table.values(), strict=True)], averages


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
