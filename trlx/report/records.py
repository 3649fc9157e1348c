"""What a run left in its folder, read for the report: metrics, samples, alarms, settings, environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trlx.tracking import ALARMS, CONFIG, ENVIRONMENT, METRICS, SAMPLES, read_lines

Series = list[tuple[int, float]]
"""(optimizer step, value) in the order of the run."""

PANELS = {
    "Score of rollouts": ("rollout_scores/mean", "scores_mean"),
    "KL to the first policy, nats per sequence": ("policy/kl",),
    "Loss": ("losses/total_loss", "losses/loss", "loss"),
    "Policy loss": ("losses/policy_loss",),
    "Value loss": ("losses/value_loss", "losses/loss_v"),
    "Clipped share of probability ratios": ("policy/clipfrac",),
    "Q loss": ("losses/loss_q",),
    "CQL loss": ("losses/loss_cql",),
    "AWAC loss": ("losses/loss_awac",),
    "Clipped share, of tokens of negative advantage": ("policy/clipfrac_low",),
    "Clipped share, of tokens of positive advantage": ("policy/clipfrac_high",),
    "Entropy of the policy, nats per token": ("policy/entropy",),
    "Response length, tokens": ("rollouts/response_length", "eval/response_length"),
    "Share of responses that ended": ("rollouts/ended", "eval/ended"),
    "Accuracy": ("accuracy",),
    "Margin": ("margin",),
    "Gradient norm before clipping": ("grad_norm",),
}
"""Title of a panel -> the names that the metric has in different methods. The page opens with these; a
picture has a run's first six."""

MOST_POINTS = 4000
"""Points of a series that a page gets. Of longer ones it gets the lowest and the highest of each stretch."""
MOST_STEPS, MOST_ROWS, MOST_CHARACTERS, MOST_HISTOGRAMS = 20, 40, 2000, 100
"""Evaluations, and collections of rollouts, that a page shows; samples of each; characters of a text; collections whose
scores and advantages it shows."""


@dataclass(frozen=True)
class Record:
    """A run as its files tell it. What it did not write is empty."""

    name: str
    metrics: dict[str, Series]
    samples: list[dict[str, Any]]
    """Of some evaluations and collections: kind ("eval", "rollout"), step, columns, rows."""
    histograms: dict[str, list[list[Any]]]
    """By name, of some collections: step, low, high, counts; see `trlx.methods.masked.histogram_of`."""
    alarms: list[dict[str, Any]]
    """Warnings and errors: step, message, and time where it is known."""
    starts: list[dict[str, Any]]
    """See `trlx.tracking.environment`, one for each time that the run was started."""
    settings: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, name: str, runs: int = 1) -> Record:
        """Reads a run's folder; the more runs share the page, the fewer samples and histograms.

        Raises:
            FileNotFoundError: there are no metrics in `folder`.
        """
        metrics, broken = _split(folder)
        settings, samples = folder / CONFIG, folder / SAMPLES
        return cls(
            name=name,
            metrics=metrics,
            samples=[*_samples(samples, "eval", runs), *_samples(samples, "rollout", runs)],
            histograms=_histograms(samples, runs),
            alarms=[*_not_finite(broken), *read_lines(folder / ALARMS)],
            starts=list(read_lines(folder / ENVIRONMENT)),
            settings=json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {},
        )

    def last(self, name: str) -> float | None:
        """The last value of a metric; None if the run did not log it."""
        return self.metrics[name][-1][1] if name in self.metrics else None

    @property
    def clock(self) -> Series:
        """(step, seconds that the run had taken by its end), without the time between two starts."""
        clock, before, last = [], 0.0, 0.0
        for step, seconds in self.metrics.get("time/elapsed", []):
            if seconds < last:  # started again
                before += last
            last = seconds
            clock.append((step, before + last))
        return clock

    @property
    def tokens_per_second(self) -> float | None:
        """The mean over the whole time of the run."""
        ends = dict(self.clock)
        tokens, before = 0.0, 0.0
        for step, rate in self.metrics.get("time/tokens_per_second", []):
            end = ends.get(step, before)
            tokens, before = tokens + rate * (end - before), end
        return tokens / before if before else None


def read_metrics(folder: Path) -> dict[str, Series]:
    """Metric -> ``[(step, value), ...]`` in the order of the file. Values that were not finite are left out.

    Raises:
        FileNotFoundError: there are no metrics in `folder`.
    """
    return _split(Path(folder))[0]


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """At most `most` points: the lowest and the highest of each stretch, and the last point."""
    if len(series) <= most:
        return series
    size = -(-len(series) // (most // 2))
    kept = []
    for first in range(0, len(series) - 1, size):
        stretch = sorted(series[first : min(first + size, len(series) - 1)], key=lambda point: point[1])
        kept += sorted({stretch[0], stretch[-1]})
    return [*kept, series[-1]]


def _split(folder: Path) -> tuple[dict[str, Series], dict[str, list[int]]]:
    """The finite values of each metric, and the steps at which it was not finite."""
    path = folder / METRICS
    if not path.exists():
        raise FileNotFoundError(f"no {METRICS} in {folder}; name the run's train.logging_dir or train.checkpoint_dir")
    metrics: dict[str, Series] = {}
    broken: dict[str, list[int]] = {}
    for entry in read_lines(path):
        step = entry.pop("step", None)
        for name, value in entry.items():
            if value is None:
                broken.setdefault(name, []).append(step)
            else:
                metrics.setdefault(name, []).append((step, value))
    return metrics, broken


def _not_finite(broken: dict[str, list[int]]) -> Iterator[dict[str, Any]]:
    for name, steps in broken.items():
        often = "" if len(steps) == 1 else f" {len(steps)} times, last at step {steps[-1]}"
        yield {"step": steps[0], "message": f"{name} was not a finite number{often}"}


def _samples(folder: Path, kind: str, runs: int) -> Iterator[dict[str, Any]]:
    for step, path in _files(folder, kind, max(MOST_STEPS // runs, 2)):
        rows = [row for _, row in zip(range(max(MOST_ROWS // runs, 4)), read_lines(path), strict=False)]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            cells = [[_cut(row.get(column)) for column in columns] for row in rows]
            yield {"kind": kind, "step": step, "columns": columns, "rows": cells}


def _histograms(folder: Path, runs: int) -> dict[str, list[list[Any]]]:
    found: dict[str, list[list[Any]]] = {}
    for step, path in _files(folder, "histogram", max(MOST_HISTOGRAMS // runs, 10)):
        for row in read_lines(path):
            found.setdefault(row["name"], []).append([step, row["low"], row["high"], row["counts"]])
    return found


def _files(folder: Path, kind: str, most: int) -> Iterator[tuple[int, Path]]:
    """(Step, file) of samples of `kind`: the first and the last and others between, as evenly as there are."""
    files = sorted(folder.glob(f"{kind}_*.jsonl"))
    shown = min(len(files), most)
    for place in sorted({round(number * (len(files) - 1) / max(shown - 1, 1)) for number in range(shown)}):
        yield int(files[place].stem.removeprefix(f"{kind}_")), files[place]


def _cut(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    return f"{value[:MOST_CHARACTERS]}…" if isinstance(value, str) and len(value) > MOST_CHARACTERS else value
