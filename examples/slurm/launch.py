"""torchrun that answers as the training processes do: 75 (saved on request, start me again) stays 75.

Usage: python examples/slurm/launch.py [torchrun's options] -m MODULE [ARGUMENTS ...]

Left to itself torchrun answers 1 to whatever they answer.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def exit_code(error: ChildFailedError) -> int:
    """That of the process that failed first, as a shell puts it: 128 + n for one that died of signal n."""
    _, failure = error.get_first_failure()
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(exit_code(error))
