"""One page about runs: charts, samples, alarms, settings. It is one file that fetches nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any

from trlx.config import flat
from trlx.report.records import PANELS, Record, thinned
from trlx.tracking import REPORT

PARTS = Path(__file__).parent / "parts"
"""Script and style of the page, and the chart library uPlot with its licence."""
SEVERAL = "reports.html"
"""The page of several runs, in the folder that holds all of them."""
MEASURED = ("reward/", "metrics/", "eval/")
"""Evaluations log these."""
NAMES_OF_RUNS = ("train.checkpoint_dir", "train.logging_dir", "train.rollout_logging_dir", "train.run_name")
MOST_ALARMS = 200


def write_page(folders: Sequence[Path], title: str | None = None, out: Path | None = None) -> Path:
    """Writes one page about all runs in `folders`. A reader sees the old page or the new one, never a part.

    Args:
        folders: ``train.logging_dir``, or ``train.checkpoint_dir``, of each run.
        title: headline of the page; by default the names of the runs.
        out: the page; by default ``report.html`` in the folder of a single run, and ``reports.html`` in the folder
            that holds all of several.

    Raises:
        ValueError: there are no folders, or one is named twice.
        FileNotFoundError: there are no metrics in one of them.
    """
    if not folders:
        raise ValueError("name the folder of at least one run")
    paths = [Path(folder).resolve() for folder in folders]
    records = [Record.of(Path(folder), name) for folder, name in zip(folders, _names(paths), strict=True)]
    inside = paths[0] / REPORT if len(paths) == 1 else Path(os.path.commonpath(paths)) / SEVERAL
    out = Path(out or inside)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text(page(records, title or ", ".join(record.name for record in records)), encoding="utf-8")
    part.replace(out)
    return out


def page(records: list[Record], title: str) -> str:
    """The text of a page about runs. It needs no other file."""
    written = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    sections = [
        f'<h1>{escape(title)}</h1><p class="note">Written {written}</p>',
        _overview(records),
        _headline(records),
        '<section id="charts"></section><section id="kl"></section><section id="samples"></section>',
        "<noscript>Charts and samples need JavaScript.</noscript>",
        _alarms(records),
        _differences(records),
        _environment(records),
        *(_settings(record, len(records)) for record in records),
        _script(records, title),
    ]
    return html(title, sections, _part("uPlot.min.css") + _part("page.css"))


def html(title: str, parts: Iterable[str], style: str | None = None) -> str:
    """A page of the parts that are not empty. The page needs no other file."""
    style = _part("page.css") if style is None else style
    return _FRAME.format(title=escape(title), style=style, body="\n".join(filter(None, parts)))


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table for `html`; numbers get four digits, and None an empty cell."""
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{paths[0]} is named twice")


def _overview(records: list[Record]) -> str:
    rows = []
    for record in records:
        step = max((series[-1][0] for series in record.metrics.values()), default=0)
        clock, started = record.clock, [start["started"] for start in record.starts]
        duration = str(timedelta(seconds=round(clock[-1][1]))) if clock else None
        begun = started[0].replace("T", " ")[:19] if started else None
        rows.append([record.name, str(step), begun, len(started) or None, duration, record.tokens_per_second])
    columns = ["run", "step", "began", "starts", "duration", "tokens/s"]
    return table(*_filled(columns, [[*row, len(record.alarms)] for row, record in zip(rows, records, strict=True)]))


def _filled(columns: list[str], rows: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
    """A table without the columns that are empty in every row. The last column of `rows` counts alarms."""
    columns = [*columns, "alarms"]
    kept = [place for place in range(len(columns)) if any(row[place] is not None for row in rows)]
    return [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _headline(records: list[Record]) -> str:
    """The first, lowest, highest and last value of every metric of the evaluations; of the loss if there is none."""
    rows = []
    for record in records:
        measured = [name for name in record.metrics if name.startswith(MEASURED)]
        measured = measured or [names[0] for names in _panels([record]).values()][:1]
        for name in measured:
            values = [value for _, value in record.metrics[name]]
            rows.append([name, record.name, values[0], min(values), max(values), values[-1]])
    if len(records) == 1:
        rows = [[name, *numbers] for name, _, *numbers in rows]
    else:
        rows.sort(key=lambda row: row[0])
    columns = ["metric", *(["run"] if len(records) > 1 else []), "first", "lowest", "highest", "last"]
    return table(columns, rows) if rows else ""


def _panels(records: list[Record]) -> dict[str, list[str]]:
    """Title -> the names that the metric has in these runs, for what everybody looks at."""
    there = {name for record in records for name in record.metrics}
    found = {title: [name for name in names if name in there] for title, names in PANELS.items()}
    return {title: names for title, names in found.items() if names}


def _alarms(records: list[Record]) -> str:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        for alarm in record.alarms:
            found.setdefault((record.name, alarm["message"]), []).append(alarm)
    rows = []
    for (name, message), alarms in found.items():
        when = str(alarms[0].get("time", "")).replace("T", " ")[:19]
        rows.append([str(alarms[0]["step"]), when, name, len(alarms), message])
    if not rows:
        return ""
    if len(records) == 1:
        rows = [[step, when, times, message] for step, when, _, times, message in rows]
    columns = ["step", "time", *(["run"] if len(records) > 1 else []), "times", "message"]
    more = f" <small>the first {MOST_ALARMS} of {len(rows)}</small>" if len(rows) > MOST_ALARMS else ""
    return f'<section id="alarms"><h2>Alarms{more}</h2>{table(columns, rows[:MOST_ALARMS])}</section>'


def _differences(records: list[Record]) -> str:
    if len(records) == 1:
        return ""
    settings = [flat(record.settings) for record in records]
    names = sorted({name for each in settings for name in each} - {*NAMES_OF_RUNS})
    rows = [[name, *(_told(each, name) for each in settings)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    shown = table(["setting", *(record.name for record in records)], rows) if rows else "<p>None.</p>"
    return f'<section id="differences"><h2>Settings that differ</h2>{shown}</section>'


def _told(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else ""


def _environment(records: list[Record]) -> str:
    """What each run told of its last start."""
    told = {record.name: record.starts[-1] for record in records if record.starts}
    names = list(dict.fromkeys(name for each in told.values() for name in each))
    rows = [[name, *(each.get(name) for each in told.values())] for name in names]
    columns = ["", *told] if len(records) > 1 else ["last start", ""]
    return f'<section id="environment"><h2>Environment</h2>{table(columns, rows)}</section>' if rows else ""


def _settings(record: Record, runs: int) -> str:
    if not record.settings:
        return ""
    text = json.dumps(record.settings, indent=2, ensure_ascii=False)
    of = f" of {escape(record.name)}" if runs > 1 else ""
    return f"<details><summary>Settings{of}</summary><pre>{escape(text)}</pre></details>"


def _script(records: list[Record], title: str) -> str:
    """What the page draws, as JSON, and the scripts that draw it."""
    panels = _panels(records)
    measured = dict.fromkeys(name for record in records for name in record.metrics if name.startswith(MEASURED))
    data = {
        "title": title,
        "runs": [_drawn(record) for record in records],
        "titles": {name: told for told, names in panels.items() for name in names},
        "shown": [*measured, *(name for names in panels.values() for name in names if name not in measured)],
    }
    # "</script>" in a sample must not end the element
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    library, licence = _part("uPlot.iife.min.js"), _part("LICENSE.uPlot")
    scripts = f"<script>/*\n{licence}*/\n{library}</script>\n<script>{_part('page.js')}</script>"
    return f'<script type="application/json" id="data">{text}</script>\n{scripts}'


def _drawn(record: Record) -> dict[str, Any]:
    """Metrics share their lists of steps: metric -> [number of the list, values]."""
    lists: dict[tuple[int, ...], int] = {}
    metrics = {}
    for name, series in record.metrics.items():
        steps, values = zip(*thinned(series), strict=True)
        metrics[name] = [lists.setdefault(steps, len(lists)), [_short(value) for value in values]]
    clock = [[step, round(seconds, 1)] for step, seconds in thinned(record.clock)]
    return {"name": record.name, "steps": list(lists), "metrics": metrics, "clock": clock, "samples": record.samples}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number">{value:.4g}</td>'
    return f"<td>{escape('' if value is None else str(value))}</td>"


_FRAME = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
