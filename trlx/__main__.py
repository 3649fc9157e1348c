"""``python -m trlx``: the command line."""

import sys

from trlx.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
