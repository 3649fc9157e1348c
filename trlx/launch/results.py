"""What a sweep found: a table of its trials, their curves, and the best settings as YAML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from trlx.launch.curves import COLORS, draw
from trlx.launch.report import picture, print_table
from trlx.optional import is_available
from trlx.report.page import html, table
from trlx.report.records import Series


@dataclass(frozen=True)
class Result:
    """A trial: its name and settings, the metric at every evaluation, and why it failed (None: it did not)."""

    name: str
    hparams: dict[str, Any]
    series: Series
    error: str | None = None

    @property
    def is_ranked(self) -> bool:
        """Whether it measured the metric and did not fail."""
        return bool(self.series) and self.error is None


def ranked(results: Iterable[Result], mode: str) -> list[Result]:
    """The best last evaluation first; trials that are not ranked at the end."""
    sign = -1 if mode == "max" else 1
    return sorted(results, key=lambda trial: (0, sign * trial.series[-1][1]) if trial.is_ranked else (1, 0))


def write_results(folder: Path, results: list[Result], metric: str, mode: str, varied: Iterable[str]) -> list[Path]:
    """Prints the table and writes ``summary.html``, and ``best.yaml`` if a trial is ranked; returns their paths.

    Args:
        results: in the order of `ranked`.
        varied: names of the settings that get a column.
    """
    title = f"{folder.name}: {metric}, {mode}"
    columns = ["trial", *varied, "last", "best", "step", "error"]
    best_of = max if mode == "max" else min
    rows = []
    for trial in results:
        values = [value for _, value in trial.series]
        measured = [values[-1], best_of(values), trial.series[-1][0]] if values else [None, None, None]
        rows.append([trial.name, *map(trial.hparams.get, varied), *measured, trial.error])
    print_table(title, columns[:-1], [row[:-1] for row in rows])
    for trial in results:
        if trial.error is not None:
            print(f"{trial.name}: {trial.error}")
    page = folder / "summary.html"
    page.write_text(html(title, [_curves(folder, title, results), table(columns, rows)]), encoding="utf-8")
    if not results or not results[0].is_ranked:
        return [page]
    return [page, _write_best(folder / "best.yaml", results[0], title)]


def _curves(folder: Path, title: str, results: list[Result]) -> str:
    """The curves of the best trials, as many as there are colours; only the title without matplotlib."""
    curves = {f"metrics/{trial.name}": trial.series for trial in results if trial.is_ranked}
    if not curves or not is_available("matplotlib"):
        return f"<h1>{escape(title)}</h1>"
    draw(dict(list(curves.items())[: len(COLORS)]), title, folder / "summary.png")
    return picture(title, folder / "summary.png")


def _write_best(path: Path, best: Result, title: str) -> Path:
    from omegaconf import OmegaConf

    config = OmegaConf.create()
    for name, value in best.hparams.items():
        OmegaConf.update(config, name, value)
    step, value = best.series[-1]
    head = f"# {best.name} of {title}: {value:.6g} at step {step}\n"
    path.write_text(head + OmegaConf.to_yaml(config), encoding="utf-8")
    return path
