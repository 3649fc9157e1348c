"""Two revisions compared, on a git repository made for it."""

import json
import runpy
import subprocess
import sys

import pytest

from trlx.launch.cli import main
from trlx.launch.compare import area, differences

# Measures PACE * step. With the seed it tells whether it was run in turns. Sets old metrics aside, as every run does.
SCRIPT = """
import json, sys
from pathlib import Path
from pace import PACE

folder = Path("ckpts/run")
if folder.exists():
    (folder / "earlier.1").mkdir()
    (folder / "metrics.jsonl").rename(folder / "earlier.1" / "metrics.jsonl")
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "metrics.jsonl", "w") as file:
    for step in (0, 2, 6):
        file.write(json.dumps({"step": step, "reward/mean": PACE * step, "time/step": 9.0}) + "\\n")
with open(sys.argv[2], "a") as order:
    order.write(f"{PACE} {sys.argv[1]}\\n")
"""


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits: "slow" measures 1 a step, "main" 3 a step."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    (folder / "runs").mkdir()
    (folder / "runs" / "script.py").write_text(SCRIPT)  # pace.py is not beside it, but in the revision's root
    for pace in (1.0, 3.0):
        (folder / "pace.py").write_text(f"PACE = {pace}\n")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", f"pace {pace}")
    git(folder, "branch", "slow", "HEAD~1")
    monkeypatch.chdir(folder)
    return folder


def test_each_revision_runs_its_own_code_in_turns(repository, tmp_path, capsys):
    order, out = tmp_path / "order", tmp_path / "out"
    script = f"python runs/script.py {{seed}} {order}"
    assert (
        main(["compare", "HEAD", "--against", "slow", "--script", script, "--seeds", "1", "2", "--out", str(out)]) == 0
    )
    assert order.read_text().splitlines() == ["1.0 1", "3.0 1", "1.0 2", "3.0 2"]
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["commits"] == {
        "against": git(repository, "rev-parse", "slow"),
        "revision": git(repository, "rev-parse", "main"),
    }
    # the area under a line from 0 to 6 is half its height
    assert comparison["metrics"] == [
        {
            "run": "ckpts/run",
            "metric": "reward/mean",
            "seeds": 2,
            "against_last": 6.0,
            "against_area": 3.0,
            "revision_last": 18.0,
            "revision_area": 9.0,
        }
    ]
    assert "+12" in capsys.readouterr().out
    assert (out / "revision" / "ckpts" / "run@2" / "metrics.jsonl").exists()


def test_no_worktree_is_left(repository, tmp_path):
    main(
        [
            "compare",
            "main",
            "--against",
            "slow",
            "--script",
            f"python runs/script.py 1 {tmp_path / 'o'}",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert git(repository, "worktree", "list").count("\n") == 0
    assert git(repository, "status", "--porcelain") == ""


def test_a_branch_of_another_repository_is_fetched(repository, tmp_path):
    other = tmp_path / "other"
    git(tmp_path, "clone", "--quiet", str(repository), str(other))
    (other / "pace.py").write_text("PACE = 7.0\n")
    git(other, "commit", "--quiet", "--all", "--message", "pace 7")
    out = tmp_path / "out"
    script = f"python runs/script.py 1 {tmp_path / 'order'}"
    assert main(["compare", f"{other}:main", "--script", script, "--out", str(out)]) == 0
    (row,) = json.loads((out / "comparison.json").read_text())["metrics"]
    assert (row["against_last"], row["revision_last"]) == (18.0, 42.0)


def test_what_cannot_be_compared_says_why(repository, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="git knows no revision 'mian'"):
        main(["compare", "mian", *out])
    with pytest.raises(SystemExit, match=r"ended with code 1:(.|\n)*IndexError"):
        main(["compare", "main", "--script", "python runs/script.py", *out])
    with pytest.raises(SystemExit, match=r"wrote no metrics\.jsonl below its current folder"):
        first = f"python runs/script.py 1 {tmp_path / 'order'}"
        main(["compare", "main", "--script", first, "--script", "python -c pass", *out])


def test_an_area_is_the_mean_over_steps():
    assert area([(0, 0.0), (1, 2.0), (4, 2.0)]) == 1.75  # (1 * 1 + 3 * 2) / 4
    assert area([(5, 3.0)]) == 3.0


def test_metrics_that_one_side_lacks_and_times_are_left_out():
    old = {"run@1": {"reward/mean": [(0, 1.0)], "metrics/gone": [(0, 1.0)], "time/step": [(0, 1.0)]}}
    new = {"run@1": {"reward/mean": [(0, 2.0)], "time/step": [(0, 1.0)]}, "other@1": {"reward/mean": [(0, 2.0)]}}
    assert [row["metric"] for row in differences(old, new)] == ["reward/mean"]


def test_the_command_has_its_old_name_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reference", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("trlx.reference", run_name="__main__")
    assert "Usage: trlx compare" in capsys.readouterr().out
