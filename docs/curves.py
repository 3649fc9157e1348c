"""Draws the curves of the pages in docs/methods/, and writes the numbers into their tables. The runs are those of the
examples: random walks, on a CPU, a minute or two each.

Usage: python -m docs.curves [ppo grpo rft sft ilql dpo kto reward ...] [--runs FOLDER]

A run that is in FOLDER already is drawn again without training.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from trlx.report.records import Series, read_metrics

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"
PICTURES = ROOT / "docs" / "pictures" / "methods"
WALKS = "python -m examples.randomwalks."
COLORS = ("#0072B2", "#D55E00", "#009E73")
SMALL = {"svg.fonttype": "none", "svg.hashsalt": "trlx", "font.size": 9, "font.family": "sans-serif"}
"""Text as text, and the same file from the same numbers."""


class Picture(NamedTuple):
    """Runs, and what is drawn of them."""

    commands: dict[str, str]
    """By label, what is typed."""
    panels: dict[str, tuple[str, ...]]
    """By title, the names of statistics."""


GROUPS = WALKS + "ppo_randomwalks --preset randomwalks-grpo"
PREFERENCES = WALKS + "preferences_randomwalks "
SAMPLES = {"optimality of samples": ("metrics/optimality",)}
REWARD = {"reward of samples": ("reward/mean",)}
RUNS = {
    "sft": Picture({"": WALKS + "sft_randomwalks"}, {"loss": ("loss",), **SAMPLES}),
    "ppo": Picture(
        {
            "init_kl_coef=0": WALKS + "ppo_randomwalks",
            "init_kl_coef=0.1": WALKS + "ppo_randomwalks method.init_kl_coef=0.1",
        },
        {**REWARD, "KL to the first policy": ("policy/kl",)},
    ),
    "grpo": Picture(
        {"GRPO": GROUPS, "RLOO": GROUPS + " method.advantage=rloo method.loss_type=dapo"},
        {**REWARD, "groups of equal scores": ("rollouts/groups_alike",)},
    ),
    "rft": Picture(
        {"": WALKS + "rft_randomwalks"}, {**REWARD, "scores so far, and their threshold": ("scores_mean", "thresholds")}
    ),
    "ilql": Picture(
        {"": WALKS + "ilql_randomwalks"},
        {
            "optimality of samples": tuple(f"metrics/optimality@beta={beta}" for beta in (0, 1, 100)),
            "losses": ("losses/loss_cql", "losses/loss_awac", "losses/loss_q"),
        },
    ),
    "dpo": Picture(
        {"": PREFERENCES + "dpo"},
        {**SAMPLES, "accuracy": ("eval/accuracy",), "rewards": ("eval/rewards/chosen", "eval/rewards/rejected")},
    ),
    "kto": Picture(
        {"": PREFERENCES + "kto"}, {**SAMPLES, "loss": ("loss",), "rewards": ("rewards/chosen", "rewards/rejected")}
    ),
    "reward": Picture({"": PREFERENCES + "reward"}, {"loss": ("loss", "eval/loss"), "accuracy": ("eval/accuracy",)}),
}


def run(command: str, folder: Path, name: str) -> dict[str, Series]:
    """The numbers of a run by name; it trains in `folder` unless its numbers are there."""
    # the pretrained walker, from which the others start, is what the example of SFT writes
    out = "ckpts/randomwalks/pretrained" if name == "sft" else name
    metrics = folder / out / ("sft" if name == "sft" else "")
    if not (metrics / "metrics.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        typed = [sys.executable, *shlex.split(command)[1:], "--out", out]
        subprocess.run(typed, cwd=folder, env=environment, check=True)
    return read_metrics(metrics)


def draw(picture: Picture, runs: dict[str, dict[str, Series]], path: Path) -> None:
    """One panel beside the other, as an SVG."""
    with matplotlib.rc_context(SMALL):
        figure = Figure(figsize=(4 * len(picture.panels), 2.6), layout="constrained")
        panels = figure.subplots(1, len(picture.panels))
        for axes, (title, names) in zip(panels, picture.panels.items(), strict=True):
            curves = {
                label or name.partition("@")[2] or name: run[name] for label, run in runs.items() for name in names
            }
            for color, (label, series) in zip(COLORS, curves.items(), strict=False):
                axes.plot(*zip(*series, strict=True), color=color, label=label, lw=1.5)
            axes.set_title(title)
            axes.set_xlabel("optimizer step")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if len(curves) > 1:
                axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def with_numbers(page: str, runs: list[dict[str, Series] | None]) -> str:
    """A page with the numbers of `runs` in its tables "at step", in this order; None leaves a table as it is."""
    left, numbers, steps, lines = iter(runs), None, [], []
    for line in page.splitlines(keepends=True):
        first, *cells = [cell.strip() for cell in line.split("|")[1:-1]] or [""]
        if first == "at step":
            numbers, steps = next(left), list(map(int, cells))
        elif numbers and first.startswith("`"):
            line = f"| {' | '.join([first, *(at(numbers[first.strip('`')], step) for step in steps)])} |\n"
        elif not first:
            numbers = None
        lines.append(line)
    return "".join(lines)


def at(series: Series, step: int) -> str:
    """The number of the step that is nearest to `step`, as it is written in a table."""
    value = min(series, key=lambda point: abs(point[0] - step))[1]
    text = f"{value:.{0 if abs(value) >= 10 else 2 if abs(value) >= 0.0095 else 3}f}"
    return text if float(text) else "0"


def main(names: list[str], folder: Path) -> None:
    """Trains, writes docs/pictures/methods/NAME.svg and the tables of docs/methods/."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, dict[str, Series]] = {}
    for name in names:
        picture = RUNS[name]
        runs = {
            label: run(command, folder, f"{name}-{label}" if label else name)
            for label, command in picture.commands.items()
        }
        draw(picture, runs, PICTURES / f"{name}.svg")
        drawn[name] = next(iter(runs.values()))
        print(PICTURES / f"{name}.svg")
    for page in METHODS.glob("*.md"):
        of_page = ["dpo", "kto"] if page.stem == "dpo" else [page.stem]
        page.write_text(with_numbers(page.read_text(encoding="utf-8"), [drawn.get(name) for name in of_page]), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("ckpts/curves"), help="where runs are written")
    args = parser.parse_args()
    unknown = set(args.names) - set(RUNS)
    if unknown:
        parser.error(f"no picture is called {', '.join(sorted(unknown))}")
    main(args.names or list(RUNS), args.runs)
