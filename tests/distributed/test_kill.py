"""SIGKILL at random moments: no checkpoint is ever unreadable, and the run ends as if nothing had happened."""

import random
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.processes import kill, start, together
from tests.runs import metrics, run, weights
from trlx import checkpoint

pytestmark = pytest.mark.distributed

KILLS = 6
"""For each kind of run, 60 in all."""
RUNS = [("PPO", 1), ("PPO", 2), ("GRPO", 1), ("SFT", 1), ("SFT", 2), ("ILQL", 1), ("RFT", 1)]
RUNS += [("DPO", 1), ("KTO", 1), ("Reward", 1)]
"""Method and number of processes."""
SETTINGS = {"checkpoint_interval": 1, "eval_interval": 3, "total_steps": 24, "epochs": 100}


def check_readable(folder):
    """Everything that looks like a checkpoint loads."""
    found = [path for path in folder.iterdir() if path.name.startswith(("checkpoint_", "best_checkpoint"))]
    for path in found:
        state, _ = checkpoint.read_state(path)
        load_file(path / "policy.safetensors")
        checkpoint.read_optimizer(path / "optimizer.safetensors")
        assert state["schedule"]["step"] >= 0
    if found:
        AutoModel.from_pretrained(max(found) / "hf_model")


def lines(folder):
    try:
        return len((folder / "metrics.jsonl").read_bytes().splitlines())
    except FileNotFoundError:  # not there yet, or just being put aside by a run that resumes
        return 0


def wait_for_a_random_moment(dice, ranks, folder):
    """Some steps from now, or at any time while the run is still starting; then somewhere within a step."""
    target = lines(folder) + dice.choice([0, 1, 2, 3])
    while lines(folder) < target and all(process.is_alive() for process in ranks):
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.1))


@pytest.mark.parametrize(("method", "size"), RUNS)
def test_a_run_killed_again_and_again_ends_like_one_left_in_peace(tmp_path, method, size):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    together(size, run, method, whole, train=SETTINGS)
    killed.mkdir()
    settings = {**SETTINGS, "resume_from_checkpoint": "auto", "async_save": size == 2}
    dice = random.Random(f"{method} {size}")
    for _ in range(KILLS):
        ranks = start(size, run, method, killed, train=settings)
        wait_for_a_random_moment(dice, ranks, killed)
        assert all(process.is_alive() for process in ranks), "the run ended before it could be killed"
        kill(dice.sample(ranks, size))
        check_readable(killed)
    together(size, run, method, killed, train=settings)
    expected, found = weights(whole), weights(killed)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert metrics(killed) == metrics(whole)
