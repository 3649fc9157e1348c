"""What a sweep found: a table of its trials, one report over all of them, and the best settings as YAML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trlx.launch.report import print_table
from trlx.launch.space import Space
from trlx.launch.trial import SETTINGS
from trlx.report.page import write_page
from trlx.report.records import Series, read_metrics
from trlx.tracking import METRICS, REPORT

FOLDERS = "trial_*"
BEST = "best.yaml"


@dataclass(frozen=True)
class Result:
    """A trial: its name and settings, the metric at every evaluation, and why it failed (None: it did not)."""

    name: str
    settings: dict[str, Any]
    series: Series
    error: str | None = None

    @property
    def is_ranked(self) -> bool:
        """Whether it measured the metric and did not fail."""
        return bool(self.series) and self.error is None


def read_results(folder: Path, space: Space, errors: Mapping[str, str]) -> list[Result]:
    """All trials in the folder of a sweep: the best last evaluation first, those that are not ranked at the end.

    Args:
        errors: by name of a trial, why it failed.
    """
    results = []
    for trial in sorted(folder.glob(FOLDERS)):
        settings = json.loads((trial / SETTINGS).read_text(encoding="utf-8"))
        settings = {name: settings[name] for name in ("train.seed", *space.fixed, *space.varied)}
        series = read_metrics(trial).get(space.tune.metric, []) if (trial / METRICS).exists() else []
        results.append(Result(trial.name, settings, series, errors.get(trial.name)))
    sign = -1 if space.tune.mode == "max" else 1
    return sorted(results, key=lambda trial: (0, sign * trial.series[-1][1]) if trial.is_ranked else (1, 0))


def title_of(folder: Path, space: Space) -> str:
    """The headline of the table and of the report."""
    return f"{folder.name}: {space.tune.metric}, {space.tune.mode}"


def write_report(folder: Path, names: Iterable[str], title: str) -> list[Path]:
    """Writes ``report.html``, a page about the trials of these names that measured something; no page if none did."""
    runs = [folder / name for name in names if (folder / name / METRICS).exists()]
    return [write_page(runs, title, folder / REPORT)] if runs else []


def write_results(folder: Path, results: Sequence[Result], space: Space) -> list[Path]:
    """Prints the table of `read_results`, writes ``report.html``, and ``best.yaml`` if a trial is ranked.

    Returns:
        The paths of what was written.
    """
    title, varied = title_of(folder, space), list(space.varied)
    best_of = max if space.tune.mode == "max" else min
    rows = []
    for trial in results:
        values = [value for _, value in trial.series]
        measured = [values[-1], best_of(values), trial.series[-1][0]] if values else [None, None, None]
        rows.append([trial.name, *map(trial.settings.get, varied), *measured])
    print_table(title, ["trial", *varied, "last", "best", "step"], rows)
    for trial in results:
        if trial.error is not None:
            print(f"{trial.name}: {trial.error}")
    pages = write_report(folder, [trial.name for trial in results], title)
    if not results or not results[0].is_ranked:
        return pages
    return [*pages, _write_best(folder / BEST, results[0], title)]


def _write_best(path: Path, best: Result, title: str) -> Path:
    from omegaconf import OmegaConf

    config = OmegaConf.create()
    for name, value in best.settings.items():
        OmegaConf.update(config, name, value)
    step, value = best.series[-1]
    head = f"# {best.name} of {title}: {value:.6g} at step {step}\n"
    path.write_text(head + OmegaConf.to_yaml(config), encoding="utf-8")
    return path
