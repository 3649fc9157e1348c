"""``trlx demo``: a method learns to find shortest paths, offline and on a CPU, in minutes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

import trlx
from trlx.launch.demo.training import learn_offline, learn_online, pretrain
from trlx.launch.report import write_report
from trlx.report.records import Series, read_metrics

PRESETS = {"ppo": "randomwalks", "grpo": "randomwalks-grpo", "ilql": "randomwalks-ilql"}


def run(method: str = "ppo", out: Path = Path("ckpts/randomwalks"), seed: int = 1000) -> Series:
    """Trains into ``<out>/<method>``, prints the learning curve, and writes it there as picture and page.

    PPO and GRPO start from a small GPT-2 that is taught to imitate random walks, ILQL from a random one.

    Raises:
        ValueError: there is no demonstration of the method.
    """
    if method not in PRESETS:
        raise ValueError(f"There is no demonstration of {method!r}: write --method {', '.join(PRESETS)}")
    # a second thread gains nothing on matrices this small, and costs minutes where another program wants its core
    torch.set_num_threads(1)
    folder = out / method
    config = trlx.load_preset(PRESETS[method]).evolve(train={"checkpoint_dir": str(folder), "seed": seed})
    if method == "ilql":
        learn_offline(config)
    else:
        learn_online(config.evolve(model={"model_path": str(pretrain(out / "pretrained", seed=seed))}))
    curve = _curve(folder)
    pages = write_report(folder, f"Shortest paths on a random graph: {method.upper()}")
    _print_curve(curve)
    _print_list("The curve as picture and page:", map(str, pages))
    _print_list("Next:", _next(method, folder))
    return curve


def _curve(folder: Path) -> Series:
    """The optimality at every evaluation; where they sample in several ways, of the last."""
    metrics = read_metrics(folder)
    return metrics[[name for name in metrics if name.startswith("metrics/optimality")][-1]]


def _print_curve(curve: Series, width: int = 50) -> None:
    print("\nMean optimality of sampled walks (1 = always a shortest path)")
    for step, optimality in curve:
        print(f"  step {step:4d}  {optimality:.3f}  {'█' * round(optimality * width)}")


def _print_list(title: str, lines: Iterable[str]) -> None:
    print("", title, *(f"  {line}" for line in lines), sep="\n")


def _next(method: str, folder: Path) -> list[str]:
    return [
        f"trlx generate {folder} --prompt q  # a walk from q to a",
        f"trlx demo --method {'ppo' if method == 'grpo' else 'grpo'}  # another method, the same task",
        "trlx ppo --help  # your own model, prompts and reward",
    ]
