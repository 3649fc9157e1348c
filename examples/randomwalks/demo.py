"""Watch PPO learn, offline and on a CPU, in less than two minutes.

Usage: python -m examples.randomwalks.demo [--out FOLDER] [--seed N]

Pretrains a small GPT-2 on random walks, improves it with PPO, then prints the learning curve and writes it as
``<out>/ppo/report.png`` and ``report.html``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from examples.randomwalks import ppo_randomwalks
from examples.randomwalks.sft_randomwalks import pretrain
from trlx.launch.report import write_report
from trlx.report.records import read_metrics


def main(out: Path = Path("ckpts/randomwalks"), seed: int = 1000) -> dict[int, float]:
    """Runs the demonstration; returns mean optimality by optimizer step."""
    # a second thread gains nothing on matrices this small, and costs minutes where another program wants its core
    torch.set_num_threads(1)
    model = pretrain(out / "pretrained", seed=seed)
    run = out / "ppo"
    ppo_randomwalks.main(
        {
            "model.model_path": str(model),
            "train.checkpoint_dir": str(run),
            "train.seed": seed,
        }
    )
    curve = read_metrics(run)["metrics/optimality"]
    pages = write_report(run, "Shortest paths on a random graph")
    _print_curve(curve)
    print("The curve as picture and page:", *pages, sep="\n  ")
    return dict(curve)


def _print_curve(curve: list[tuple[int, float]], width: int = 50) -> None:
    print("\nMean optimality of sampled walks (1 = always a shortest path)")
    for step, optimality in curve:
        print(f"  step {step:4d}  {optimality:.3f}  {'█' * round(optimality * width)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ckpts/randomwalks"))
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    main(args.out, args.seed)
