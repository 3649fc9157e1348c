"""``trlx demo`` under another name: watch PPO learn, offline and on a CPU, in less than two minutes.

Usage: python -m examples.randomwalks.demo [--method ppo|grpo|ilql] [--out FOLDER] [--seed N]
"""

import sys

from trlx.launch.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
