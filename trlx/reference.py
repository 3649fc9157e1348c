"""``python -m trlx.reference``: the compare command under its name in CarperAI's trlx."""

import sys

from trlx.launch.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
