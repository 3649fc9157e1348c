"""``trlx compare``: the metrics of the same scripts at two revisions of a git repository."""

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

import torch

from trlx.launch.report import print_table
from trlx.report.records import Series, read_metrics
from trlx.tracking import EARLIER, METRICS

SCRIPTS = (
    "python -m examples.randomwalks.sft_randomwalks --seed {seed}",
    "python -m examples.randomwalks.ppo_randomwalks --seed {seed}",
    "python -m examples.randomwalks.ilql_randomwalks --seed {seed}",
)
"""They take minutes on a CPU. PPO starts from the model that SFT writes."""
SHOWN = ("reward/", "metrics/", "losses/total_loss")
"""Metrics are compared if their names begin so."""

Runs = dict[str, dict[str, Series]]
"""Name of a run -> its metrics. The name is the folder of its metrics.jsonl in the worktree, ``@`` and the seed."""


def compare(revision: str, against: str, scripts: Sequence[str], seeds: Sequence[int], out: Path) -> Path:
    """Runs scripts with the code of two revisions, prints how their metrics differ and writes ``comparison.json``.

    Each revision is checked out into a temporary worktree of the repository that holds the current folder. Each script
    runs at `against` and then at `revision`, before the next script: if the machine slows down, it slows both.

    Args:
        revision, against: a revision as git names it, or REPOSITORY:BRANCH. The repository is a path, an address, or
            owner/name on GitHub.
        scripts: command lines. ``python`` becomes the running interpreter, and ``{seed}`` the seed.
        out: folder for ``comparison.json`` and the ``metrics.jsonl`` of every run.

    Raises:
        ValueError: git does not know a revision.
        ChildProcessError: a script failed, or wrote no metrics below its worktree.
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
    """One row for every metric that both revisions measured.

    A row holds the last value and the mean over steps (`area`) of both, averaged over seeds.
    """
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
    """The area under a curve divided by its number of steps: the mean over steps, in the metric's own unit."""
    steps, values = torch.tensor(series, dtype=torch.float64).T
    span = steps[-1] - steps[0]
    return float(torch.trapezoid(values, steps) / span if span else values[-1])


def _commit(name: str) -> str:
    """The commit that a name stands for. REPOSITORY:BRANCH is fetched first."""
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
    """Runs a command with the code of a worktree, copies the new metrics to `out` and returns them."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob(METRICS)}
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    # Python finds the worktree's trlx before an installed one
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise ChildProcessError(f"{command} ended with code {done.returncode}:\n{end}")
    found = [path for path in folder.rglob(METRICS) if not path.parent.name.startswith(EARLIER)]
    written = [path for path in found if before.get(path) != path.stat().st_mtime_ns]
    if not written:
        raise ChildProcessError(f"{command} wrote no {METRICS} below its current folder: leave out absolute paths")
    runs = {}
    for path in written:
        name = f"{path.parent.relative_to(folder).as_posix()}@{seed}"
        (out / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out / name)
        runs[name] = read_metrics(path.parent)
    return runs


def _print(rows: list[dict], names: dict[str, str]) -> None:
    cells = []
    for row in rows:
        cells.append([row["run"], row["metric"]])
        for kind in ("last", "area"):
            old, new = row[f"against_{kind}"], row[f"revision_{kind}"]
            cells[-1] += [new, f"{new - old:+.3g}"]
    columns = ["run", "metric", "last", "difference", "mean over steps", "difference"]
    print_table(f"{names['revision']} minus {names['against']}", columns, cells)
