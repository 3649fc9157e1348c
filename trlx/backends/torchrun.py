"""torchrun with the exit code of the training processes: 75 (the run was asked to save and start again) stays 75.

Usage: python -m trlx.backends.torchrun [torchrun's options] -m MODULE [ARGUMENTS ...]

torchrun itself exits with 1, whatever code they exit with. Here Ctrl-C gives 130 and another signal 75. What the first
process that failed has left for the user in torchrun's error file is printed once.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.run import main

from trlx.tracebacks import TOLD_ONCE


def exit_code(error: ChildFailedError) -> int:
    """The exit code of the process that failed first; 128 + n, as in a shell, if signal n ended it."""
    _, failure = error.get_first_failure()
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


def message(error: ChildFailedError) -> str:
    """What the process that failed first says; if it left nothing, its rank and exit code."""
    rank, failure = error.get_first_failure()
    told = failure.error_file_data
    # torch fills in a message of its own, but no time
    return told["message"] if "timestamp" in told else f"Process {rank} ended first, with exit code {failure.exitcode}"


if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `message` says what failed
    os.environ[TOLD_ONCE] = "1"
    try:
        inspect.unwrap(main)()  # whose decorator logs that it found an error file
    except SignalException as asked:  # the processes got the signal, too, and have ended
        sys.exit(130 if asked.sigval == signal.SIGINT else 75)
    except ChildFailedError as error:
        print(message(error), file=sys.stderr)
        sys.exit(exit_code(error))
    except (
        RendezvousConnectionError
    ):  # it asks the first node in turns with its own processes, which end at the same time
        print("torchrun has ended on the first node, which says why", file=sys.stderr)
        sys.exit(1)
