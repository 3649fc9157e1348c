"""ILQL on random walks: from a random model and walks of all qualities to shortest ones.

Usage: python -m examples.randomwalks.ilql_randomwalks [--seed N] [--out FOLDER] [method.tau=0.7 ...]
       torchrun --nproc-per-node 4 -m examples.randomwalks.ilql_randomwalks --backend megatron --tp 2 --pp 2

Evaluations sample at beta 0 (imitation of the walks), 1 and 100 (the step of highest Q).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import trlx
from examples.megatron import add_backend, backend
from examples.randomwalks.sft_randomwalks import EVAL_SAMPLES, small_gpt2
from examples.randomwalks.task import RandomWalks
from examples.randomwalks.tokenizer import letter_tokenizer


def main(hparams: Mapping[str, Any] | None = None, preset: str = "randomwalks-ilql", overrides: Sequence[str] = ()):
    """One run. `overrides` are texts such as "method.tau=0.7"; `hparams`, dotted or nested, come after them."""
    task = RandomWalks()
    tokenizer = letter_tokenizer(task.letters)
    config = trlx.load_preset(preset, overrides=overrides).evolve(
        model={"model_path": small_gpt2(tokenizer)},
        tokenizer={"tokenizer_path": tokenizer},
        train={"trainer_kwargs": {"logit_mask": task.forbidden(len(tokenizer), tokenizer.eos_token_id)}},
    )
    return trlx.train(
        samples=[[walk[0], walk[1:]] for walk in task.walks],
        rewards=task.optimality(task.walks),
        eval_prompts=task.prompts * EVAL_SAMPLES,
        metric_fn=task.metric_fn,
        config=trlx.TRLConfig.update(config, hparams or {}),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="randomwalks-ilql", help="randomwalks-ilql, or a YAML file")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", default="ckpts/randomwalks/ilql", help="folder of checkpoints, metrics and samples")
    add_backend(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting of the config")
    args = parser.parse_intermixed_args()
    given = {"train.seed": args.seed, "train.checkpoint_dir": args.out, **backend(args, "ILQL")}
    main(given, args.preset, args.overrides)
