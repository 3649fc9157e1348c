"""Jobs under a real SLURM: they save before their limit, are requeued, resume, and survive the loss of a node."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

from examples.randomwalks import RandomWalks
from examples.randomwalks.sft_randomwalks import small_gpt2
from examples.randomwalks.tokenizer import letter_tokenizer
from tests.runs import metrics
from tests.slurm.cluster import Cluster, missing, until
from trlx import checkpoint
from trlx.launch.slurm.follow import follow, state_of

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "slurm"
JUDGE = """
import json
import os
import time
from pathlib import Path

from examples.randomwalks import RandomWalks

task = RandomWalks()


def share_of_edges(samples, **_):
    hold, log = Path("hold"), Path("run/metrics.jsonl")
    if "SLURM_JOB_ID" in os.environ and hold.exists():
        done = sum("losses/total_loss" in json.loads(line) for line in log.read_text().splitlines())
        if done >= int(hold.read_text()):
            Path("reached").write_text(hold.read_text())
            time.sleep(600)
    walks = [[task.letters.index(node) for node in walk] for walk in samples]
    return [sum(task.edges[pair] for pair in zip(walk, walk[1:])) / task.max_length for walk in walks]
"""
"""A reward that takes too long once the file `hold` says so: after so many steps of the run."""
STUB = """#!/usr/bin/env bash
echo "$SLURMD_NODENAME $*"
exit $STUB_CODE
"""
"""In place of Python."""

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


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
def stubs(cluster, tmp_path_factory):
    """By what they show, the numbers of short jobs, which run while the first test goes on."""
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stub").write_text(STUB)
    (folder / "stub").chmod(0o755)

    def sbatch(file, code, *options, requeues=100):
        small = ["--gpus-per-node=2", "--cpus-per-task=1", f"--output={folder}/%j.log"]
        given = {"PYTHON": str(folder / "stub"), "STUB_CODE": str(code), "REQUEUES": str(requeues)}
        command = ["sbatch", "--parsable", *small, *options, str(FILES / file), "some.module", "two words", "a=b"]
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, **given}, check=True, capture_output=True, text=True
        ).stdout.strip()

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
    Path("hold").write_text("3")
    small = "method.num_rollouts=16 method.chunk_size=8 train.batch_size=8 method.ppo_epochs=1 train.total_steps=6"
    often = "train.checkpoint_interval=2 train.eval_interval=6"
    words = f"randomwalks {small} {often} --model model --prompts starts.txt --reward judge.py:share_of_edges".split()
    asks = "--nodes 2 --gpus-per-node 0 --cpus 1 --time 1 --save-before 15 --out run".split()
    trlx = [sys.executable, "-m", "trlx"]
    with open("printed", "wb") as out, started([*trlx, "submit", *words, *asks], out) as submitted:
        number = past_its_limit()
        with started([*trlx, "train", *words, "--out", "undisturbed", "--processes", "2"], out) as undisturbed:
            assert undisturbed.wait(100) == 0
        lose_a_node(cluster, number)
        assert submitted.wait(100) == 0, Path("printed").read_text()[-5000:]
    said = Path("printed").read_text()
    assert "is requeued: the run was asked to save and stop" in said and f"Job {number}: completed, start 3" in said
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


def past_its_limit():
    """Waits until a run that stands still at step 3 is requeued because its time is over. The number of its job."""
    until(lambda: re.search(r"Job (\d+):", Path("printed").read_text()), "the job is submitted")
    number = re.search(r"Job (\d+):", Path("printed").read_text()).group(1)
    until(lambda: state_of(number)["Restarts"] == "1", "the job is requeued before its limit", seconds=100)
    Path("hold").write_text("5")
    subprocess.run(["scontrol", "update", f"JobId={number}", "TimeLimit=10"], check=True)
    return number


def lose_a_node(cluster, number):
    """Kills the second node of a run that stands still at step 5."""
    until(lambda: Path("reached").exists() and Path("reached").read_text() == "5", "the resumed run has done step 5")
    cluster.kill_node(cluster.ask("scontrol", "show", "hostnames", state_of(number)["NodeList"]).split()[1])
    Path("hold").unlink()


def test_torchrun_starts_once_on_every_node_with_a_process_for_each_gpu(stubs, capsys):
    assert follow(stubs["ends"], poll_seconds=0.5) == 0
    lines = capsys.readouterr().out.splitlines()
    port = 10000 + int(stubs["ends"])
    meets = f"--rdzv-id {stubs['ends']} --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}"
    starts = f"-m trlx.backends.torchrun --nnodes 2 --nproc-per-node 2 {meets} -m some.module two words a=b"
    assert len(lines) == len({line.split()[0] for line in lines}) == 2
    assert all(line.split(maxsplit=1)[1] == f"{starts} train.resume_from_checkpoint=auto" for line in lines)


def test_a_run_that_fails_is_not_requeued(stubs, capsys):
    assert follow(stubs["fails"], poll_seconds=0.5) == 1
    assert state_of(stubs["fails"])["Restarts"] == "0"


def test_a_run_that_never_comes_to_its_end_is_requeued_so_often(stubs, capsys):
    assert follow(stubs["saves"], poll_seconds=0.5) == 1
    assert state_of(stubs["saves"])["Restarts"] == "2"
    assert "This job was requeued 1 times, which is the limit" in capsys.readouterr().out
