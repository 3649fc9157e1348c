"""How fast PPO learns examples/randomwalks: our preset beside the original's hyper-parameters, several seeds each.

    python -m benchmarks.learning_curves                    # 3 seeds of both presets
    python -m benchmarks.learning_curves --presets randomwalks --seeds 1 2 3 --samples 10
    python -m benchmarks.learning_curves --presets randomwalks-grpo "randomwalks-grpo method.advantage=rloo"

Every run starts from one language model, pretrained once. A point is the mean optimality of walks sampled from every
start, `--samples` of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import trlx
from trlx.launch.demo.task import RandomWalks
from trlx.launch.demo.training import pretrain
from trlx.report.environment import environment
from trlx.report.records import read_metrics

STEPS = range(0, 101, 20)


def curve(model: Path, preset: str, seed: int, samples: int, out: Path) -> dict[int, float]:
    """Mean optimality by optimizer step of one run of 100 steps; settings may follow the name of `preset`."""
    task = RandomWalks()
    folder = out / f"{preset}-{seed}".replace(" ", "-")
    name, *overrides = preset.split()
    config = trlx.load_preset(name, overrides=overrides).evolve(
        model={"model_path": str(model)},
        train={"seed": seed, "eval_interval": 20, "checkpoint_dir": str(folder), "save_best": False, "tracker": None},
    )
    # only the steps shown: the schedules stay those of the whole run
    config = config.evolve(train={"total_steps": max(STEPS)})
    prompts = task.prompts
    trlx.train(
        reward_fn=task.reward_fn,
        prompts=prompts,
        eval_prompts=prompts * samples,
        metric_fn=task.metric_fn,
        config=config,
    )
    return {step: value for step, value in read_metrics(folder)["metrics/optimality"] if step in STEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["randomwalks", "trlx-2024"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--samples", type=int, default=10, help="walks from each start at an evaluation")
    parser.add_argument("--out", type=Path, default=Path("runs/learning_curves"))
    options = parser.parse_args()
    model = pretrain(options.out / "pretrained")
    results = {"environment": environment(), "samples": options.samples}
    for preset in options.presets:
        curves = {seed: curve(model, preset, seed, options.samples, options.out) for seed in options.seeds}
        mean = {step: statistics.mean(each[step] for each in curves.values()) for step in STEPS}
        results[preset] = {"seeds": curves, "mean": mean}
    for preset in options.presets:
        print(f"\n{preset}: mean optimality of seeds {options.seeds} by step")
        for step, value in results[preset]["mean"].items():
            each = " ".join(f"{seed[step]:.3f}" for seed in results[preset]["seeds"].values())
            print(f"  {step:4d}  {value:.3f}   ({each})")
    (options.out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
