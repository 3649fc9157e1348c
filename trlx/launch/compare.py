"""Two revisions of a git repository compared by the metrics of the same scripts, run in turns."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trlx.launch.curves import Series
from trlx.launch.report import read_metrics
from trlx.tracking import EARLIER, METRICS

SCRIPTS = (
    "python -m examples.randomwalks.sft_randomwalks --seed {seed}",
    "python -m examples.randomwalks.ppo_randomwalks --seed {seed}",
    "python -m examples.randomwalks.ilql_randomwalks --seed {seed}",
)
"""Minutes on a CPU. PPO begins with the model that the first one writes."""
SHOWN = ("reward/", "metrics/", "losses/total_loss")
"""Beginnings of the names of metrics that are compared."""

Runs = dict[str, dict[str, Series]]
"""Metrics by the name of the run: the path of metrics.jsonl in the worktree, and the seed."""


def compare(revision: str, against: str, scripts: Sequence[str], seeds: Sequence[int], out: Path) -> Path:
    """Runs scripts with the code of two revisions, prints how their metrics differ and writes ``comparison.json``.

    Each revision is checked out into a temporary worktree of the repository around the current folder. For every seed
    and script first `against` runs, then `revision`, so that a machine which slows down slows both.

    Args:
        revision, against: what git can resolve, or REPOSITORY:BRANCH, a path, address or owner/name on GitHub.
        scripts: command lines; ``python`` is this one, ``{seed}`` becomes the seed.
        out: folder; also gets the ``metrics.jsonl`` of every run.

    Raises:
        ValueError: git does not know a revision.
        RuntimeError: a script failed, or wrote no metrics below its worktree.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = {"against": against, "revision": revision}
    commits = {side: _commit(name) for side, name in names.items()}
    with _worktree(commits["against"]) as first, _worktree(commits["revision"]) as second:
        found: dict[str, Runs] = {"against": {}, "revision": {}}
        for seed in seeds:
            for script in scripts:
                for side, folder in (("against", first), ("revision", second)):
                    command = script.replace("{seed}", str(seed))
                    print(f"{names[side]}: {command}", flush=True)
                    found[side] |= _run(command, folder, seed, out / side)
    rows = differences(found["against"], found["revision"])
    _print(rows, names)
    path = out / "comparison.json"
    path.write_text(json.dumps({"commits": commits, **names, "metrics": rows}, indent=1), encoding="utf-8")
    return path


def differences(against: Runs, revision: Runs) -> list[dict]:
    """For every metric that both measured: the last value and the mean over steps (`area`), averaged over seeds."""
    series: dict[tuple[str, str], list[tuple[Series, Series]]] = {}
    for run, metrics in against.items():
        for name, old in metrics.items():
            new = revision.get(run, {}).get(name)
            if new and name.startswith(SHOWN):
                series.setdefault((run.partition("@")[0], name), []).append((old, new))
    rows = []
    for (run, name), pairs in series.items():
        row = {"run": run, "metric": name, "seeds": len(pairs)}
        for side, position in (("against", 0), ("revision", 1)):
            row[f"{side}_last"] = fmean(pair[position][-1][1] for pair in pairs)
            row[f"{side}_area"] = fmean(area(pair[position]) for pair in pairs)
        rows.append(row)
    return rows


def area(series: Series) -> float:
    """The area under a curve by the trapezoid rule, divided by its steps: a mean in the metric's own unit."""
    steps = series[-1][0] - series[0][0]
    if not steps:
        return series[-1][1]
    pairs = zip(series, series[1:], strict=False)
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs) / steps


def _commit(name: str) -> str:
    """The commit that a name stands for, fetched where the name says from where."""
    repository, _, branch = name.rpartition(":")
    if repository:
        is_github = repository.count("/") == 1 and not Path(repository).exists()
        _git("fetch", "--quiet", f"https://github.com/{repository}" if is_github else repository, branch)
        name = "FETCH_HEAD"
    return _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", name=name)


@contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    parent = Path(tempfile.mkdtemp(prefix="trlx-compare-"))
    try:
        _git("worktree", "add", "--quiet", "--detach", str(parent / "code"), commit)
        yield parent / "code"
    finally:
        shutil.rmtree(parent)
        _git("worktree", "prune")


def _git(*arguments: str, name: str | None = None) -> str:
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if answer.returncode != 0:
        what = f"git knows no revision {name!r}" if name else f"git {' '.join(arguments)} failed"
        raise ValueError(f"{what}. {answer.stderr.strip()}".strip())
    return answer.stdout.strip()


def _run(command: str, folder: Path, seed: int, out: Path) -> Runs:
    """Runs a command in a worktree with its code; the metrics that are new there, copied to `out`."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob(METRICS)}
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    # before an installed trlx, whichever revision that is of
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"{command} ended with code {done.returncode}:\n{end}")
    found = [path for path in folder.rglob(METRICS) if not path.parent.name.startswith(EARLIER)]
    written = [path for path in found if before.get(path) != path.stat().st_mtime_ns]
    if not written:
        raise RuntimeError(f"{command} wrote no {METRICS} below its current folder: leave out absolute paths")
    runs = {}
    for path in written:
        name = f"{path.parent.relative_to(folder).as_posix()}@{seed}"
        (out / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out / name)
        runs[name] = read_metrics(path.parent)
    return runs


def _print(rows: list[dict], names: dict[str, str]) -> None:
    title = f"{names['revision']} minus {names['against']}"
    table = Table("run", "metric", "last", "difference", "mean over steps", "difference", title=title)
    for row in rows:
        cells = [row["run"], row["metric"]]
        for kind in ("last", "area"):
            old, new = row[f"against_{kind}"], row[f"revision_{kind}"]
            cells += [f"{new:.4g}", f"{new - old:+.3g}"]
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    Console().print(table)
