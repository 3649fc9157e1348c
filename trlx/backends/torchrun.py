"""torchrun with the exit code of the training processes: 75 (the run was asked to save and start again) stays 75.

Usage: python -m trlx.backends.torchrun [torchrun's options] -m MODULE [ARGUMENTS ...]

torchrun itself exits with 1, whatever code they exit with.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def exit_code(error: ChildFailedError) -> int:
    """The exit code of the process that failed first; 128 + n, as in a shell, if signal n ended it."""
    _, failure = error.get_first_failure()
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes have said what failed
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"Process {rank} ended first, with exit code {failure.exitcode}", file=sys.stderr)
        sys.exit(exit_code(error))
