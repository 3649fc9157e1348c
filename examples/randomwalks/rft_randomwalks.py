"""Rejection fine-tuning of the pretrained walker (see sft_randomwalks.py) on the shortest of its own walks.

Usage: python -m examples.randomwalks.rft_randomwalks [--model FOLDER] [--seed N] [--out FOLDER] [section.key=value ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from examples.randomwalks import ppo_randomwalks
from trlx.launch.demo.training import PRETRAINED


def main(hparams: Mapping[str, Any] | None = None, preset: str = "randomwalks-rft", overrides: Sequence[str] = ()):
    """One run: the task and its reward are those of PPO, the preset names another trainer."""
    return ppo_randomwalks.main(hparams, preset, overrides)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED), help="folder with model and tokenizer")
    parser.add_argument("--preset", default="randomwalks-rft", help="randomwalks-rft, or a YAML file")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", default="ckpts/randomwalks/rft", help="folder of checkpoints, metrics and samples")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting of the config")
    args = parser.parse_intermixed_args()
    folders = {"model.model_path": args.model, "train.checkpoint_dir": args.out}
    main({**folders, "train.seed": args.seed}, args.preset, args.overrides)
