"""The sbatch files do on this machine, with stand-ins for SLURM's commands, what they are to do on a cluster."""

import itertools
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from examples.slurm.launch import exit_code
from trlx import checkpoint
from trlx.run.failures import EXIT_REQUEUE

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
COMMANDS = {
    # runs a step without its options, and passes SIGUSR1 on to every process of it
    "srun": """
        everyone() { for each; do echo "$each"; everyone $(cat /proc/$each/task/*/children 2>/dev/null); done; }
        while [[ $1 == --* ]]; do shift; done
        trap 'kill -USR1 $(everyone "$step") 2>/dev/null' USR1
        "$@" & step=$!; echo "$step" > "$STEP"
        while kill -0 "$step" 2>/dev/null; do wait "$step"; done
        wait "$step"
    """,
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" > "$ASKED"; fi',
}


@pytest.fixture
def cluster(tmp_path):
    """Environment of a batch script on a node with two "GPUs"."""
    for name, body in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    own = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STEP": str(tmp_path / "step")}
    job = {
        "SLURM_JOB_ID": str(job_with_a_free_port()),
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_ON_NODE": "2",
    }
    return {**os.environ, **job, **own, "ASKED": str(tmp_path / "asked"), "SLURM_JOB_NODELIST": "here"}


def job_with_a_free_port():
    """The number of a job at whose port nobody listens."""

    def is_free(number):
        with socket.socket() as port:
            return port.connect_ex(("127.0.0.1", 10000 + number % 20000)) != 0

    return next(number for number in itertools.count(os.getpid()) if is_free(number))


def submit(file, cluster, folder, *arguments):
    """Starts a batch script; SLURM would do it in the folder that sbatch was called in."""
    with (folder / "output").open("a") as output:
        return subprocess.Popen(
            ["bash", str(file), *map(str, arguments)],
            cwd=ROOT,
            env=cluster,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def waited(job, folder, seconds=120):
    """The exit code of a job; kills its processes if it does not come."""
    try:
        return job.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        pytest.fail((folder / "output").read_text()[-3000:])


@pytest.mark.parametrize("file", [*FILES, *(ROOT / "examples" / "slurm").glob("*.sh")], ids=lambda path: path.name)
def test_bash_understands_the_file(file):
    subprocess.run(["bash", "-n", str(file)], check=True)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_a_job_is_told_before_its_end_and_may_be_put_back_into_the_queue(file):
    options = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=B:USR1@300", "--ntasks-per-node=1", "--gpus-per-node=8"} <= set(options)
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


@pytest.mark.distributed
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_in_its_next_job(cluster, tmp_path):
    (file,) = [path for path in FILES if path.name == "accelerate_single_node.sbatch"]
    run = tmp_path / "run"
    tiny = ["--model", "tiny", "--data", "made", "--reward", "made", "--out", run]
    quick = ["train.batch_size=4", "train.tracker=null", "train.save_best=false", "method.gen_kwargs.max_new_tokens=4"]
    command = ["examples.sft_sentiments", *tiny, *quick]

    # the signal comes as early as it can: no process of the step knows what to do with it yet
    job = submit(file, cluster, tmp_path, *command, "train.total_steps=100000", "train.epochs=100000")
    while job.poll() is None and not (tmp_path / "step").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert waited(job, tmp_path) == EXIT_REQUEUE, (tmp_path / "output").read_text()[-3000:]
    assert (tmp_path / "asked").read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
    # if it was asked before its first step, there is nothing to save
    saved = checkpoint.newest(run)
    stopped = checkpoint.read_state(saved)[0]["schedule"]["step"] if saved else 0
    assert losses(run) == list(range(1, stopped + 1))

    (tmp_path / "asked").unlink()
    job = submit(file, cluster, tmp_path, *command, f"train.total_steps={stopped + 1}", "train.epochs=100000")
    assert waited(job, tmp_path) == 0, (tmp_path / "output").read_text()[-3000:]
    assert not (tmp_path / "asked").exists()
    assert losses(run) == list(range(1, stopped + 2))


def losses(run):
    """The steps whose loss is logged."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line["step"] for line in lines if "loss" in line]
