"""Jobs under a real SLURM: they save before their limit, are requeued, resume, and survive the loss of a node."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

from tests.runs import metrics
from tests.slurm.cluster import Cluster, missing, until
from trlx import checkpoint
from trlx.launch.demo.task import RandomWalks
from trlx.launch.demo.tokenizer import letter_tokenizer
from trlx.launch.demo.training import small_gpt2
from trlx.launch.slurm.follow import follow, state_of

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "slurm"
JUDGE = """
import json
import os
import time
from pathlib import Path

from trlx.launch.demo.task import RandomWalks

task = RandomWalks()


def steps_done():
    return sum("losses/total_loss" in json.loads(line) for line in Path("run/metrics.jsonl").open())


def share_of_edges(samples, **_):
    while "SLURM_JOB_ID" in os.environ and steps_done() >= (limit := int(Path("hold").read_text())):
        Path("reached").write_text(str(limit))
        time.sleep(0.1)
    walks = [[task.letters.index(node) for node in walk] for walk in samples]
    return [sum(task.edges[pair] for pair in zip(walk, walk[1:])) / task.max_length for walk in walks]
"""
"""A reward that does not come, in jobs, once the run has done as many steps as the file `hold` says."""
STUB = """#!/usr/bin/env bash
echo "$SLURMD_NODENAME $*"
trap 'exit 75' TERM
while [ -e "$STUB_HOLD" ]; do sleep 0.1; done
exit $STUB_CODE
"""
"""In place of Python: saves when it is asked to stop, and fails or ends once the file STUB_HOLD is gone."""

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def sbatch(cluster, tmp_path_factory):
    """Submits one of the files with the stub, which holds if the file at `hold` is there; returns the job's number."""
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stub").write_text(STUB)
    (folder / "stub").chmod(0o755)

    def submit(file, code, *options, requeues=100, hold="nowhere"):
        small = ["--gpus-per-node=2", "--cpus-per-task=1", f"--output={folder}/%j.log"]
        given = {"PYTHON": folder / "stub", "STUB_CODE": code, "STUB_HOLD": hold, "REQUEUES": requeues}
        given = {name: str(value) for name, value in given.items()}
        command = ["sbatch", "--parsable", *small, *options, str(FILES / file), "some.module", "two words", "a=b"]
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, **given}, check=True, capture_output=True, text=True
        ).stdout.strip()

    return submit


@pytest.fixture(scope="module")
def stubs(sbatch):
    """By what they show, the numbers of short jobs, which run while the first test goes on."""
    return {
        "ends": sbatch("megatron_multi_node.sbatch", 0, "--nodes=2"),
        "fails": sbatch("megatron_single_node.sbatch", 1),
        "saves": sbatch("accelerate_single_node.sbatch", 75, requeues=1),
    }


def test_a_run_survives_its_time_limit_and_a_dead_node_with_the_numbers_of_an_undisturbed_run(
    cluster, stubs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    task, tokenizer = RandomWalks(), letter_tokenizer(RandomWalks().letters)
    GPT2LMHeadModel(small_gpt2(tokenizer)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("starts.txt").write_text("\n".join(task.prompts))
    Path("judge.py").write_text(JUDGE)
    hold_after(3)
    small = "method.num_rollouts=16 method.chunk_size=8 train.batch_size=8 method.ppo_epochs=1 train.total_steps=6"
    often = "train.checkpoint_interval=2 train.eval_interval=6"
    words = f"randomwalks {small} {often} --model model --prompts starts.txt --reward judge.py:share_of_edges".split()
    asks = "--nodes 2 --gpus-per-node 0 --cpus 1 --time 1 --save-before 15 --out run".split()
    trlx = [sys.executable, "-m", "trlx"]
    with open("printed", "wb") as out, started([*trlx, "submit", *words, *asks], out) as submitted:
        with past_its_limit() as number:
            # as long as the job stands still
            alone = ["--out", "undisturbed", "--processes", "2"]
            assert subprocess.run([*trlx, "train", *words, *alone], stdout=out).returncode == 0
        lose_a_node(cluster, number)
        assert submitted.wait(200) == 0, Path("printed").read_text()[-5000:]
    said = Path("printed").read_text()
    assert "is requeued: the run was asked to save and stop" in said and re.search("completed, start [3-9]", said)
    assert "RendezvousConnectionError" not in said
    assert metrics("run") == metrics("undisturbed") and metrics("run")[-1]["reward/mean"] > 0
    assert [line["step"] for line in metrics("run") if "losses/total_loss" in line] == [1, 2, 3, 4, 5, 6]
    assert checkpoint.newest("run").name == "checkpoint_6"


@contextmanager
def started(command, out):
    with subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def past_its_limit():
    """Yields the number of the job once its run stands still at step 3, then waits until its time is over."""
    until(lambda: re.search(r"Job (\d+):", Path("printed").read_text()), "the job is submitted")
    number = re.search(r"Job (\d+):", Path("printed").read_text()).group(1)
    until(lambda: Path("reached").exists() or is_requeued(number), "the run has done step 3")
    yield number
    until(lambda: is_requeued(number), "the job is requeued before its limit")
    hold_after(5)
    subprocess.run(["scontrol", "update", f"JobId={number}", "TimeLimit=10"], check=True)


def is_requeued(number):
    return state_of(number)["Restarts"] != "0"


def lose_a_node(cluster, number):
    """Kills the second node of a run that stands still at step 5."""
    until(lambda: Path("reached").exists() and Path("reached").read_text() == "5", "the resumed run has done step 5")
    cluster.kill_node(cluster.nodes_of(number)[1])
    hold_after(1000)


def hold_after(steps):
    Path("next").write_text(str(steps))
    Path("next").replace("hold")


def test_torchrun_starts_once_on_every_node_with_a_process_for_each_gpu(stubs, capsys):
    assert follow(stubs["ends"], poll_seconds=0.5) == 0
    lines = capsys.readouterr().out.splitlines()
    port = 10000 + int(stubs["ends"])
    meets = f"--rdzv-id {stubs['ends']} --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}"
    starts = f"-m trlx.backends.torchrun --nnodes 2 --nproc-per-node 2 {meets} -m some.module two words a=b"
    assert len(lines) == len({line.split()[0] for line in lines}) == 2
    assert all(line.split(maxsplit=1)[1] == f"{starts} train.resume_from_checkpoint=auto" for line in lines)


def test_the_last_node_serves_while_the_others_train(cluster, tmp_path, capsys):
    stub, script = tmp_path / "stub", tmp_path / "script"
    stub.write_text(
        '#!/usr/bin/env bash\necho "$SLURMD_NODENAME $*"\nif [ "$1" = serve ]; then sleep 300; fi\nsleep 1\n'
    )
    stub.chmod(0o755)
    library = ROOT / "trlx" / "launch" / "slurm" / "run.sh"
    script.write_text(f"#!/bin/bash\n. {library}\nPYTHON={stub} SERVERS=1 SERVE=({stub} serve)\nrun some.module\n")
    options = ["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=1", f"--output={tmp_path}/log"]
    ran = subprocess.run(["sbatch", "--parsable", *options, str(script)], check=True, capture_output=True, text=True)
    assert follow(ran.stdout.strip(), tmp_path / "log", poll_seconds=0.5) == 0
    lines = [
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "torchrun" in line or "serve" in line
    ]
    serving = [node for node, what in lines if what == "serve"]
    trains = [node for node, what in lines if what.startswith("-m trlx.backends.torchrun --nnodes 1")]
    assert len(serving) == len(trains) == 1 and serving != trains
    assert sum("train.sampler.url=[http://127.0.0.1:8000]" in what for _, what in lines) == 1


def test_a_run_that_fails_is_not_requeued(stubs, capsys):
    assert follow(stubs["fails"], poll_seconds=0.5) == 1
    assert state_of(stubs["fails"])["Restarts"] == "0"


def test_a_run_that_never_comes_to_its_end_is_requeued_so_often(stubs, capsys):
    assert follow(stubs["saves"], poll_seconds=0.5) == 1
    assert state_of(stubs["saves"])["Restarts"] == "2"
    assert "This job was requeued 1 times, which is the limit" in capsys.readouterr().out


def test_a_job_that_is_cancelled_is_not_requeued(sbatch, cluster, tmp_path, capsys):
    (tmp_path / "hold").touch()
    number = sbatch("accelerate_single_node.sbatch", 0, hold=tmp_path / "hold")
    until(lambda: holds(number) == 1, "the job runs")
    cluster.ask("scancel", number)
    assert follow(number, poll_seconds=0.5) == 1
    assert state_of(number)["JobState"] == "CANCELLED" and not is_requeued(number)


def test_a_run_that_fails_since_a_node_does_not_answer_is_requeued(sbatch, cluster, tmp_path):
    (tmp_path / "hold").touch()
    number = sbatch("accelerate_multi_node.sbatch", 1, hold=tmp_path / "hold")
    until(lambda: holds(number) == 2, "the job runs")
    cluster.kill_slurmd(cluster.nodes_of(number)[1])
    (tmp_path / "hold").unlink()
    until(lambda: is_requeued(number), "the job is requeued")
    assert f"Job {number} is requeued: a node does not answer" in Path(state_of(number)["StdOut"]).read_text()
    cluster.ask("scancel", number)


def holds(number):
    """How many nodes have started."""
    log = Path(state_of(number)["StdOut"])
    return log.read_text().count("trlx.backends.torchrun") if log.exists() else 0
