"""torchrun that answers as the training processes do: 75 (saved on request, start me again) stays 75.

Usage: python examples/slurm/launch.py [torchrun's options] -m MODULE [ARGUMENTS ...]

SLURM sends SIGUSR1 to every process of a step. Left to itself torchrun would die of it and take the training processes
along before they have saved, and answer 1 to whatever they answer.
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def exit_code(error: ChildFailedError) -> int:
    """That of the process that failed first, as a shell puts it: 128 + n for one that died of signal n."""
    _, failure = error.get_first_failure()
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


if __name__ == "__main__":
    # the training processes inherit this, too, until training begins and they listen themselves
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(exit_code(error))
