"""One page about runs: charts, samples, alarms, settings. It is one file that fetches nothing."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any

from trlx.config import flat
from trlx.report.records import MOST_POINTS, PANELS, Record, thinned
from trlx.tracking import REPORT

PARTS = Path(__file__).parent / "parts"
"""Script and style of the page, and the chart library uPlot with its licence."""
SEVERAL = "reports.html"
"""The page of several runs, in the folder that holds all of them."""
MEASURED = ("reward/", "metrics/", "eval/")
"""Evaluations log these."""
NAMES_OF_RUNS = ("train.checkpoint_dir", "train.logging_dir", "train.rollout_logging_dir", "train.run_name")
MOST_ALARMS = 200
MOST_COLUMNS = 8
"""Settings that differ in more than this have a table of their own, with a column for each run."""


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
    names = zip(folders, _names(paths), strict=True)
    records = [Record.of(Path(folder), name, len(paths)) for folder, name in names]
    inside = paths[0] / REPORT if len(paths) == 1 else Path(os.path.commonpath(paths)) / SEVERAL
    out = Path(out or inside)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text(page(records, title or _title(records)), encoding="utf-8")
    part.replace(out)
    return out


def page(records: list[Record], title: str) -> str:
    """The text of a page about runs. It needs no other file."""
    written = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    sections = [
        f'<h1>{escape(title)}</h1><p class="note">Written {written}</p>',
        _overview(records),
        _headline(records[0]) if len(records) == 1 else "",
        "".join(f'<section id="{name}"></section>' for name in ("charts", "kl", "histograms", "samples")),
        "<noscript>Charts and samples need JavaScript.</noscript>",
        _alarms(records),
        _environment(records),
        *(_settings(record, len(records)) for record in records),
        _script(records, title),
    ]
    style = _part("uPlot.min.css") + _part("page.css")
    return _FRAME.format(title=escape(title), style=style, body="\n".join(filter(None, sections)))


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table; numbers get four digits, and None an empty cell."""
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


def _title(records: list[Record]) -> str:
    names = [record.name for record in records]
    return ", ".join(names) if len(names) <= MOST_COLUMNS else f"{len(names)} runs, {names[0]} to {names[-1]}"


def _overview(records: list[Record]) -> str:
    """A table with a row for each run. Of several it says which settings differ, and the last numbers."""
    differing = _differing(records)
    aside = differing if len(differing) > MOST_COLUMNS else {}
    measured = _measured(records) if len(records) > 1 else []
    starts = [[start["started"].replace("T", " ")[:19] for start in record.starts] for record in records]
    clocks = [record.clock for record in records]
    columns = {
        "run": [record.name for record in records],
        **({} if aside else differing),
        **{name: [record.last(name) for record in records] for name in measured},
        "step": [str(max((series[-1][0] for series in record.metrics.values()), default=0)) for record in records],
        "began": [begun[0] if begun else None for begun in starts],
        "starts": [len(begun) or None for begun in starts],
        "duration": [str(timedelta(seconds=round(clock[-1][1]))) if clock else None for clock in clocks],
        "tokens/s": [record.tokens_per_second for record in records],
        "alarms": [len(record.alarms) for record in records],
    }
    columns = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    shown = f'<section id="runs">{_table(list(columns), list(zip(*columns.values(), strict=True)))}</section>'
    if aside:
        compared = _table(["", *columns["run"]], [[name, *cells] for name, cells in aside.items()])
        shown += f'<section id="differences"><h2>Settings that differ</h2>{compared}</section>'
    return shown


def _differing(records: list[Record]) -> dict[str, list[str]]:
    """By name, the value in each run of every setting that they do not share."""
    settings = [flat(record.settings) for record in records]
    names = dict.fromkeys(name for each in settings for name in each if name not in NAMES_OF_RUNS)
    told = {
        name: [json.dumps(each[name], ensure_ascii=False) if name in each else "" for each in settings]
        for name in names
    }
    return {name: values for name, values in told.items() if len(set(values)) > 1}


def _headline(record: Record) -> str:
    """The first, lowest, highest and last value of every metric of the evaluations; of the loss if there is none."""
    rows = []
    for name in _measured([record]):
        values = [value for _, value in record.metrics[name]]
        rows.append([name, values[0], min(values), max(values), values[-1]])
    return _table(["metric", "first", "lowest", "highest", "last"], rows) if rows else ""


def _measured(records: list[Record]) -> list[str]:
    """The metrics of evaluations; where there are none, the first of those that everybody looks at."""
    found = dict.fromkeys(name for record in records for name in record.metrics if name.startswith(MEASURED))
    return list(found) or [names[0] for names in _panels(records).values()][:1]


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
    return f'<section id="alarms"><h2>Alarms{more}</h2>{_table(columns, rows[:MOST_ALARMS])}</section>'


def _environment(records: list[Record]) -> str:
    """What each run told of its last start; of several runs what they all tell, or how many tell it."""
    told = [record.starts[-1] for record in records if record.starts]
    rows = []
    for name in dict.fromkeys(name for each in told for name in each):
        values = Counter(str(each[name]) for each in told if name in each)
        shown = [f"{value} ({runs} of {len(told)})" for value, runs in values.most_common(MOST_COLUMNS)]
        rows.append([name, *values] if values.total() == len(told) and len(values) == 1 else [name, "\n".join(shown)])
    title = "last start" if len(records) == 1 else "last starts"
    return f'<section id="environment"><h2>Environment</h2>{_table([title, ""], rows)}</section>' if rows else ""


def _settings(record: Record, runs: int) -> str:
    if not record.settings:
        return ""
    text = json.dumps(record.settings, indent=2, ensure_ascii=False)
    of = f" of {escape(record.name)}" if runs > 1 else ""
    return f"<details><summary>Settings{of}</summary><pre>{escape(text)}</pre></details>"


def _script(records: list[Record], title: str) -> str:
    """What the page draws, as JSON, and the scripts that draw it."""
    titles = {name: told for told, names in _panels(records).items() for name in names}
    data = {
        "title": title,
        "runs": [_drawn(record, len(records)) for record in records],
        "titles": titles,
        "shown": [*(name for name in _measured(records) if name not in titles), *titles],
    }
    # "</script>" in a sample must not end the element
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    library, licence = _part("uPlot.iife.min.js"), _part("LICENSE.uPlot")
    scripts = f"<script>/*\n{licence}*/\n{library}</script>\n<script>{_part('page.js')}</script>"
    return f'<script type="application/json" id="data">{text}</script>\n{scripts}'


def _drawn(record: Record, runs: int) -> dict[str, Any]:
    """Metrics share their lists of steps: metric -> [number of the list, values]."""
    most = max(MOST_POINTS // runs, 200)
    lists: dict[tuple[int, ...], int] = {}
    metrics = {}
    for name, series in record.metrics.items():
        steps, values = zip(*thinned(series, most), strict=True)
        metrics[name] = [lists.setdefault(steps, len(lists)), [_short(value) for value in values]]
    clock = [[step, round(seconds, 1)] for step, seconds in thinned(record.clock, most)]
    shown = {"samples": record.samples, "histograms": record.histograms}
    return {"name": record.name, "steps": list(lists), "metrics": metrics, "clock": clock, **shown}


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
