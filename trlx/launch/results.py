"""What a sweep found: a table of its trials, the best settings as YAML, and a page that needs no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trlx.launch.curves import COLORS, Series, draw
from trlx.launch.report import read_metrics
from trlx.launch.trial import RECORD
from trlx.optional import is_available
from trlx.tracking import METRICS


@dataclass(frozen=True)
class Result:
    """A trial: its folder, settings, state (finished, stopped or failed), why it failed, and every evaluation."""

    name: str
    hparams: dict[str, Any]
    state: str
    reason: str | None
    series: Series

    @property
    def is_ranked(self) -> bool:
        """Whether it measured the metric and did not fail."""
        return bool(self.series) and self.state != "failed"


def read_results(folder: Path, metric: str, mode: str) -> list[Result]:
    """The trials below `folder`, best last evaluation first, those without one or that failed at the end."""
    sign = -1 if mode == "max" else 1
    found = [_result(record.parent, metric) for record in sorted(Path(folder).glob(f"*/{RECORD}"))]
    return sorted(found, key=lambda trial: (0, sign * trial.series[-1][1]) if trial.is_ranked else (1, 0))


def write_results(folder: Path, results: list[Result], metric: str, mode: str, varied: Iterable[str]) -> list[Path]:
    """Prints the table and writes ``summary.html``, and ``best.yaml`` if any trial can be ranked; returns their paths.

    Args:
        results: as `read_results` orders them.
        varied: names of the settings that get a column.
    """
    title = f"{folder.name}: {metric}, {mode}"
    # the page is wider than a terminal
    recorder = Console(record=True, width=200, file=io.StringIO())
    for console in (Console(), recorder):
        console.print(_table(title, results, mode, list(varied)))
        for trial in results:
            if trial.state == "failed":
                console.print(Text(f"{trial.name}: {trial.reason}"))
    page = folder / "summary.html"
    # filled in last, since rich reads braces in a frame as places of its own
    filled = {"TITLE": escape(title), "PICTURE": _picture(folder, title, results)}
    text = recorder.export_html(code_format=_FRAME)
    for place, value in filled.items():
        text = text.replace(place, value, 1)
    page.write_text(text, encoding="utf-8")
    if not results or not results[0].is_ranked:
        return [page]
    return [page, _write_best(folder / "best.yaml", results[0], title)]


def _result(folder: Path, metric: str) -> Result:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    series = read_metrics(folder).get(metric, []) if (folder / METRICS).exists() else []
    # a trial that the scheduler paused and never took up again was stopped
    state = record["state"] if record["state"] in ("finished", "failed") else "stopped"
    return Result(folder.name, record["hparams"], state, record["reason"], series)


def _table(title: str, results: list[Result], mode: str, varied: list[str]) -> Table:
    best_of = max if mode == "max" else min
    table = Table("trial", "state", *varied, "last", "best", "step", title=title)
    for trial in results:
        values = [value for _, value in trial.series]
        measured = [values[-1], best_of(values), trial.series[-1][0]] if values else [None, None, None]
        cells = [trial.name, trial.state, *(trial.hparams.get(name) for name in varied), *measured]
        # as Text, since square brackets in a string would be read as markup
        table.add_row(*(Text(_cell(value), overflow="fold") for value in cells))
    return table


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _picture(folder: Path, title: str, results: list[Result]) -> str:
    """The curves of the best trials, as many as there are colours, where there is something to draw them with."""
    curves = {f"metrics/{trial.name}": trial.series for trial in results if trial.is_ranked}
    if not curves or not is_available("matplotlib"):
        return ""
    png = folder / "summary.png"
    draw(dict(list(curves.items())[: len(COLORS)]), title, png)
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}">'


def _write_best(path: Path, best: Result, title: str) -> Path:
    from omegaconf import OmegaConf

    config = OmegaConf.create()
    for name, value in best.hparams.items():
        OmegaConf.update(config, name, value)
    step, value = best.series[-1]
    head = f"# {best.name} of {title}: {value:.6g} at step {step}\n"
    path.write_text(head + OmegaConf.to_yaml(config), encoding="utf-8")
    return path


_FRAME = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>TITLE</title>
<style>{stylesheet}
body {{ color: #222; background: #fff; margin: 2rem }}
img {{ max-width: 72rem; width: 100% }}</style>
</head>
<body>
PICTURE
<pre style="font-family: monospace">{code}</pre>
</body>
</html>
"""
