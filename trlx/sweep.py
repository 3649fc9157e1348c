"""``python -m trlx.sweep``: the sweep command under its name in CarperAI's trlx."""

import sys

from trlx.launch.cli import main

__path__: list[str] = []
"""Makes ``from trlx.sweep import get_param_space`` ask `trlx.compat.imports`, whose error says what to use instead."""

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
