"""``python -m trlx report``: a run's learning curves as a picture, and a page with them, samples and settings."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trlx.launch.curves import Series, draw
from trlx.tracking import METRICS, SAMPLES

MOST_SAMPLES = 40
"""Rows of the last evaluation that the page shows."""


def write_report(folder: Path, title: str) -> tuple[Path, Path]:
    """Writes ``report.png`` and ``report.html`` into a run's folder and returns their paths.

    Reads ``metrics.jsonl`` and, if they are there, ``config.json`` and the samples of the last evaluation.

    Raises:
        FileNotFoundError: there are no metrics in `folder`.
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    folder = Path(folder)
    png, page = folder / "report.png", folder / "report.html"
    metrics = read_metrics(folder)
    draw(metrics, title, png)
    # the picture shows the title
    parts = [f"<h1>{picture(title, png)}</h1>", _headline(metrics), _samples(folder), _settings(folder / "config.json")]
    page.write_text(html(title, parts), encoding="utf-8")
    return png, page


def html(title: str, parts: list[str]) -> str:
    """A page of the parts that are not empty. The page needs no other file."""
    return _FRAME.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, parts)))


def picture(title: str, png: Path) -> str:
    """A picture for `html`, with the bytes of the file inside."""
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}">'


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Prints a table; floats get four digits, and None an empty cell."""
    printed = Table(*columns, title=title)
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value) for value in row]
        # as Text, since rich reads [square brackets] in a str as markup
        printed.add_row(*(Text(cell, overflow="fold") for cell in cells))
    Console().print(printed)


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table for `html`; numbers get four digits, and None an empty cell."""
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def read_metrics(folder: Path) -> dict[str, Series]:
    """Metric -> ``[(step, value), ...]`` in the order of the file. Values that were not finite are left out.

    Raises:
        FileNotFoundError: there are no metrics in `folder`.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        raise FileNotFoundError(f"no {METRICS} in {folder}; name the run's train.logging_dir or train.checkpoint_dir")
    metrics: dict[str, Series] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # a run that has not ended may be in the middle of its last line
        entry = json.loads(line) if line.endswith("\n") else {}
        step = entry.pop("step", None)
        for name, value in entry.items():
            if value is not None:
                metrics.setdefault(name, []).append((step, value))
    return metrics


def _headline(metrics: dict[str, Series]) -> str:
    """The first, highest and last value of every metric of the evaluations."""
    measured = {name: series for name, series in metrics.items() if name.startswith(("reward/", "metrics/"))}
    if not measured:
        return ""
    rows = [[name, series[0][1], max(value for _, value in series), series[-1][1]] for name, series in measured.items()]
    last_step = max(series[-1][0] for series in measured.values())
    return table([f"Mean over the evaluation, step 0 to {last_step}", "first", "highest", "last"], rows)


def _samples(folder: Path) -> str:
    """The first samples of the last evaluation, in the order of its prompts."""
    files = sorted((folder / SAMPLES).glob("eval_*.jsonl"))
    if not files:
        return ""
    rows = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    if not rows:
        return ""
    step = int(files[-1].stem.removeprefix("eval_"))
    shown = rows[:MOST_SAMPLES]
    count = f"{len(shown)} of {len(rows)} samples" if len(shown) < len(rows) else f"{len(rows)} samples"
    heading = f"<h2>Samples <small>{count} of the evaluation at step {step}</small></h2>"
    return heading + table(list(rows[0]), [list(row.values()) for row in shown])


def _settings(path: Path) -> str:
    if not path.exists():
        return ""
    text = json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=2, ensure_ascii=False)
    return f"<details><summary>Settings</summary><pre>{escape(text)}</pre></details>"


def _cell(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number">{value:.4g}</td>'
    return f"<td>{escape('' if value is None else str(value))}</td>"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin: 0 0 1rem }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
small { font-weight: normal; color: #666; margin-left: .5rem }
img { width: 100% }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th { text-align: left; font-weight: 600; color: #555; border-bottom: 2px solid #ddd }
th, td { padding: .25rem 1.5rem .25rem 0; vertical-align: top }
td { border-bottom: 1px solid #eee; white-space: pre-wrap }
td.number { font-variant-numeric: tabular-nums }
details { margin-top: 2rem }
summary { cursor: pointer; font-weight: 600 }
pre { font-size: .85rem; background: #f6f6f6; padding: 1rem; overflow-x: auto }
"""

_FRAME = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
