"""PPO on the pretrained walker (see sft_randomwalks.py), rewarded for short walks to the goal. Where there is
no walker yet, it is taught first.

Usage: python -m examples.randomwalks.ppo_randomwalks [--preset trlx-2024] [--seed N] [method.gamma=0.99 ...]
       torchrun --nproc-per-node 4 -m examples.randomwalks.ppo_randomwalks --backend megatron --tp 2 --pp 2
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import trlx
from examples.megatron import add_backend, backend
from trlx.launch.demo.training import PRETRAINED, learn_online, pretrain


def main(hparams: Mapping[str, Any] | None = None, preset: str = "randomwalks", overrides: Sequence[str] = ()):
    """One run. `overrides` are texts such as "method.gamma=0.99"; `hparams`, dotted or nested, come after them."""
    config = trlx.TRLConfig.update(trlx.load_preset(preset, overrides=overrides), hparams or {})
    if config.model.model_path == str(PRETRAINED) and not (PRETRAINED / "config.json").is_file():
        divided = {"trainer": "NeMoSFTTrainer", "trainer_kwargs": config.train.trainer_kwargs}
        pretrain(hparams={"train": divided} if config.train.trainer.startswith("NeMo") else None)
    return learn_online(config)


def _hparams(args: argparse.Namespace) -> dict[str, Any]:
    given = {
        "model.model_path": args.model,
        "train.seed": args.seed,
        "train.total_steps": args.total_steps,
        "train.checkpoint_dir": args.out,
    }
    return {key: value for key, value in given.items() if value is not None} | backend(args, "PPO")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with model and tokenizer (default: the preset's)")
    parser.add_argument("--preset", default="randomwalks", help="randomwalks, trlx-2024, or a YAML file")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--total-steps", type=int)
    parser.add_argument("--out", help="folder of checkpoints, metrics and samples")
    add_backend(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting of the config")
    args = parser.parse_intermixed_args()
    main(_hparams(args), args.preset, args.overrides)
