"""What can be said about the sbatch files without SLURM; tests/slurm runs them."""

import signal
import subprocess
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from trlx.backends.torchrun import exit_code

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("file", [*FILES, ROOT / "trlx" / "launch" / "slurm" / "run.sh"], ids=lambda path: path.name)
def test_bash_understands_the_file(file):
    subprocess.run(["bash", "-n", str(file)], check=True)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_a_job_is_told_before_its_end_and_may_be_put_back_into_the_queue(file):
    options = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@300",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
    } <= set(options)
    nodes = next(option for option in options if option.startswith("--nodes="))
    assert (nodes == "--nodes=1") == ("single" in file.name)


def test_the_answer_is_that_of_the_process_that_failed_first():
    def failed(code, when):
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="none")
        failure.timestamp = when
        return failure

    first, later = failed(75, when=1), failed(-signal.SIGTERM, when=2)
    assert exit_code(ChildFailedError("script", {0: later, 1: first})) == 75
    assert exit_code(ChildFailedError("script", {0: later})) == 128 + 15
