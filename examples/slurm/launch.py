"""torchrun with the exit code of the training processes: 75 (the run was asked to save and start again) stays 75.

Usage: python examples/slurm/launch.py [torchrun's options] -m MODULE [ARGUMENTS ...]

torchrun itself exits with 1, whatever code they exit with.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trlx.backends.torchrun import exit_code, main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(exit_code(error))
