"""Teaches a small random GPT-2 to imitate random walks: the model that PPO, ILQL and RFT start from.

Usage: python -m examples.randomwalks.sft_randomwalks [--out FOLDER] [--total-steps N] [--seed N]
       torchrun --nproc-per-node 4 -m examples.randomwalks.sft_randomwalks --backend megatron --tp 2 --pp 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.megatron import add_backend, backend
from trlx.launch.demo.training import PRETRAINED, pretrain

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PRETRAINED)
    parser.add_argument("--total-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1000)
    add_backend(parser)
    args = parser.parse_args()
    pretrain(args.out, args.total_steps, args.seed, backend(args, "SFT"))
