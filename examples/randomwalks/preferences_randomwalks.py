"""Which of two walks is better: DPO, KTO and a reward model from judged walks, on the pretrained walker (see
sft_randomwalks.py). Where there is no walker yet, it is taught first.

Usage: python -m examples.randomwalks.preferences_randomwalks dpo|kto|reward [--seed N] [--out FOLDER] [method.beta=1]

Pairs are two walks from one letter, of which the one that is closer to the shortest was chosen. For KTO a walk is good
if its optimality is above 0.5. One walk in five is held out.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import trlx
from trlx.launch.demo.task import RandomWalks
from trlx.launch.demo.training import EVAL_SAMPLES, PRETRAINED, pretrain

GOOD = 0.5
"""KTO's label is True above this optimality."""


def main(method: str, hparams: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()):
    """One run. `overrides` are texts such as "method.beta=0.5"; `hparams`, dotted or nested, come after them."""
    task = RandomWalks()
    walks = sorted(set(task.walks))
    random.Random(0).shuffle(walks)
    held_out, walks = walks[: len(walks) // 5], walks[len(walks) // 5 :]
    config = trlx.TRLConfig.update(trlx.load_preset(method, overrides=[*settings(method), *overrides]), hparams or {})
    if config.model.model_path == str(PRETRAINED) and not (PRETRAINED / "config.json").is_file():
        pretrain()
    sampled = {"eval_prompts": task.prompts * EVAL_SAMPLES, "metric_fn": task.metric_fn} if method != "reward" else {}
    compared = {"samples": pairs(task, walks), "eval_samples": pairs(task, held_out)}
    return trlx.train(**sampled, **({"samples": labelled(task, walks)} if method == "kto" else compared), config=config)


def settings(method: str) -> list[str]:
    """What differs from the preset of the method, which is for large models."""
    of_method = {
        "dpo": ["method.sft_coef=1.0"],
        "kto": ["method.desirable_weight=7.0"],  # one walk in seven is good
        "reward": [],
    }
    sampling = [] if method == "reward" else ["method.gen_kwargs.max_new_tokens=9"]
    return [
        *of_method[method],
        *sampling,
        f"model.model_path={PRETRAINED}",
        "optimizer.kwargs.lr=1.0e-4",
        "scheduler.name=constant",
        "scheduler.kwargs={}",
        "train.seq_length=11",
        "train.epochs=100",
        "train.total_steps=100",
        "train.batch_size=64",
        "train.minibatch_size=null",
        "train.eval_interval=10",
        "train.tracker=null",
        f"train.checkpoint_dir=ckpts/randomwalks/{method}",
    ]


def pairs(task: RandomWalks, walks: list[str]) -> list[dict[str, str]]:
    """Each walk with another one from the same letter that is better or worse, if there is one."""
    rng, couples = random.Random(0), []
    score = dict(zip(walks, task.optimality(walks), strict=True))
    for walk in walks:
        others = [other for other in walks if other[0] == walk[0] and score[other] != score[walk]]
        if others:
            couples.append((walk, rng.choice(others)))
    return preferences(task, couples)


def preferences(task: RandomWalks, couples: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """``{"prompt", "chosen", "rejected"}`` for every two walks from one letter of which one is better."""
    found = []
    for walks in couples:
        (worse, rejected), (better, chosen) = sorted(zip(task.optimality(list(walks)), walks, strict=True))
        if worse < better:
            found.append({"prompt": chosen[0], "chosen": chosen[1:], "rejected": rejected[1:]})
    return found


def labelled(task: RandomWalks, walks: list[str]) -> list[dict[str, Any]]:
    """Walks that are good or bad."""
    rows = zip(walks, task.optimality(walks), strict=True)
    return [{"prompt": walk[0], "completion": walk[1:], "label": score > GOOD} for walk, score in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["dpo", "kto", "reward"])
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", help="folder of checkpoints, metrics and samples (default: ckpts/randomwalks/METHOD)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting of the config")
    args = parser.parse_intermixed_args()
    given = {"train.seed": args.seed} | ({"train.checkpoint_dir": args.out} if args.out else {})
    main(args.method, given, args.overrides)
