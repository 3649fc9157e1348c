"""From samples to an aligned model, offline and on a CPU in minutes: SFT, a reward model, PPO, GRPO and DPO.

Usage: python -m examples.randomwalks.pipeline [--out FOLDER] [--seed N] [--steps N]

A small GPT-2 learns to imitate random walks (SFT) and samples walks of its own, which are compared in pairs: the walk
that comes closer to the shortest one is preferred. A reward model learns these preferences. PPO and GRPO learn from the
reward model, DPO learns from the preferences themselves, and PPO learns once more from the true reward, for comparison.
The true optimality of each method's walks is printed and drawn into ``<out>/pipeline.png``.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trlx
from examples.randomwalks.preferences_randomwalks import preferences
from trlx.launch.curves import draw
from trlx.launch.demo.task import RandomWalks
from trlx.launch.demo.training import EVAL_SAMPLES, pretrain
from trlx.report.records import Series, read_metrics

LEARNED_REWARD = {"cliprange_reward": None, "scale_reward": "running"}
"""Settings of methods that learn from the reward model: its numbers have no bounds."""


def main(
    out: Path = Path("ckpts/randomwalks/pipeline"), seed: int = 1000, steps: int | None = None, walks: int = 512
) -> dict[str, Series]:
    """Runs every stage; returns ``{method: [(optimizer step, optimality), ...]}``, and the reward model's accuracy.

    Args:
        steps: optimizer steps of each stage; None: enough to learn.
        walks: walks from each start that are sampled for the preferences.
    """
    # a second thread gains nothing on matrices this small
    torch.set_num_threads(1)
    task = RandomWalks()
    walker = pretrain(out / "walker", steps or 200, seed)
    rng = random.Random(seed)
    starts = [start for start in task.prompts for _ in range(walks)]
    sampled = sample_walks(walker, starts, task.max_length, seed)
    pairs = preferences(task, zip(sampled[::2], sampled[1::2], strict=True))
    # a policy finds every edge that does not exist and that the reward model likes; sampled walks show few of them
    judged = pairs + preferences(task, [(walk, shortened(walk, rng)) for walk in sampled])
    rng.shuffle(judged)

    def learn(preset: str, folder: str, method: dict[str, Any] | None = None, **data: Any) -> Path:
        """Trains a copy of the walker in a folder of its own, which it returns."""
        train = {"checkpoint_dir": str(out / folder), "seed": seed, "save_optimizer": False}
        train |= {} if steps is None else {"total_steps": steps}
        config = trlx.load_preset(preset).evolve(model={"model_path": str(walker)}, method=method or {}, train=train)
        trlx.train(config=config, **data)
        return out / folder

    held_out = len(judged) // 20
    reward = learn("randomwalks-reward", "reward", samples=judged[held_out:], eval_samples=judged[:held_out])
    judge = trlx.SequenceClassifierReward(str(reward / "best_checkpoint" / "hf_model"))
    evaluation = {"eval_prompts": task.prompts * EVAL_SAMPLES, "metric_fn": task.metric_fn}
    by_task, by_judge = ({"reward_fn": fn, "prompts": task.prompts, **evaluation} for fn in (task.reward_fn, judge))
    runs = {
        "PPO, true reward": learn("randomwalks", "ppo-true", **by_task),
        "PPO, reward model": learn("randomwalks", "ppo", {"init_kl_coef": 0.2, **LEARNED_REWARD}, **by_judge),
        "GRPO, reward model": learn(
            "randomwalks-grpo", "grpo", {"kl_in": "reward", "kl_coef": 0.1, **LEARNED_REWARD}, **by_judge
        ),
        "DPO": learn("randomwalks-dpo", "dpo", samples=pairs, **evaluation),
    }
    curves = {name: read_metrics(run)["metrics/optimality"] for name, run in runs.items()}
    draw({f"metrics/{name}": curve for name, curve in curves.items()}, "Optimality of walks", out / "pipeline.png")
    _print(curves)
    print(f"The curves as a picture:\n  {out / 'pipeline.png'}")
    return curves | {"reward model": read_metrics(reward)["eval/accuracy"]}


def sample_walks(walker: Path, starts: list[str], length: int, seed: int) -> list[str]:
    """A walk of at most `length` nodes from each start, by the model at `walker`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(walker)
    model = AutoModelForCausalLM.from_pretrained(walker)
    sampled = model.generate(
        **tokenizer(starts, return_tensors="pt"), max_new_tokens=length - 1, do_sample=True, top_k=0
    )
    return tokenizer.batch_decode(sampled, skip_special_tokens=True)


def shortened(walk: str, rng: random.Random) -> str:
    """The walk without one of its nodes, not its start: shorter, but mostly along an edge that does not exist."""
    node = rng.randrange(1, max(len(walk), 2))
    return walk[:node] + walk[node + 1 :]


def _print(curves: dict[str, Series]) -> None:
    print("\nMean optimality of sampled walks (1 = always a shortest path)")
    for name, curve in curves.items():
        (_, first), (step, last) = curve[0], curve[-1]
        print(f"  {name:20s} {first:.3f} at first, {last:.3f} after {step} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ckpts/randomwalks/pipeline"))
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--steps", type=int, help="optimizer steps of each stage, e.g. 2 to see that everything runs")
    args = parser.parse_args()
    main(args.out, args.seed, args.steps)
