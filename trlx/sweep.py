"""``python -m trlx.sweep``: the sweep command under its name in CarperAI's trlx."""

import sys

from trlx.launch.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
