"""What goes wrong on one process ends all of them within seconds, and each names the cause; a signal saves."""

import os
import signal
import sys
import threading
import time

import pytest

from tests.processes import ends, start, together
from tests.runs import DATA, length, run, share_of_a, tiny_config
from trlx import checkpoint
from trlx.backends import distress

pytestmark = pytest.mark.distributed

MEGATRON = {
    "trainer": "NeMoPPOTrainer",
    "trainer_kwargs": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


def said(folder, rank):
    return (folder / f"stderr_{rank}").read_text()


def rank_in(folder):
    """The rank of this process, whose errors go to a file from now on."""
    rank = int(os.environ["RANK"])
    os.dup2(os.open(folder / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    return rank


def disk_is_full(*args):
    raise OSError(28, "No space left on device")


def disk_is_full_and_nothing_ends(*args):
    """The connections to this process stay, so that nothing wakes the others in their collective."""
    try:
        disk_is_full()
    except OSError as error:
        distress.report(error)
        time.sleep(6)
        raise


def fails_later(call, number=3):
    """The method `call`, whose call of this number fails."""
    calls = []

    def method(*args):
        calls.append(1)
        return disk_is_full() if len(calls) == number else call(*args)

    return method


def fails(folder, where, rank, train):
    """PPO on two or four processes; on one of them something fails."""
    from trlx.data.prompts import PromptStream
    from trlx.tracking import Tracker
    from trlx.trainer.ppo import PPOTrainer

    distress.GRACE = 1.0
    if rank_in(folder) == rank:
        if where == "tracker":
            Tracker.log = fails_later(Tracker.log)
        elif where == "step":
            PPOTrainer.after_step = fails_later(PPOTrainer.after_step)
        elif where == "setup":
            PPOTrainer.add_eval_pipeline = disk_is_full_and_nothing_ends
        else:
            PromptStream.take = fails_later(PromptStream.take, 2)  # the second collection
    import trlx

    trlx.train(config=tiny_config(folder, "PPO", train=train), metric_fn=length, **DATA["PPO"])


@pytest.mark.parametrize(
    ("where", "rank", "size", "train"),
    [
        ("tracker", 0, 2, {}),
        ("step", 1, 2, {}),
        ("setup", 1, 2, {}),
        ("collection", 3, 4, MEGATRON),
    ],
)
def test_an_error_on_one_process_ends_all_and_each_names_it(tmp_path, where, rank, size, train):
    assert ends(start(size, fails, tmp_path, where, rank, train)) == [1] * size
    for each in range(size):
        assert "OSError: [Errno 28] No space left on device" in said(tmp_path, each)
        assert each == rank or f"process {rank} failed" in said(tmp_path, each)
    assert "disk_is_full" in said(tmp_path, rank)


def runs_twice(folder):
    for name in "ab":
        run("SFT", folder / name, train={"total_steps": 1})
        assert "trlx-watch" not in [thread.name for thread in threading.enumerate()]
        assert signal.set_wakeup_fd(-1) == -1


def test_nothing_watches_on_after_the_end_of_a_run(tmp_path):
    together(2, runs_twice, tmp_path)


def hangs(folder, hanging, call, train):
    """The reward of the collection after step 4, this call on this process, never comes."""
    rank = rank_in(folder)
    calls = []

    def reward(samples, prompts, outputs, **kwargs):
        calls.append(1)
        if len(calls) == call and rank == hanging:
            (folder / "hangs").touch()
            time.sleep(600)
        return share_of_a(samples, prompts, outputs)

    import trlx

    config = tiny_config(folder, "PPO", train={"checkpoint_interval": 100, **train})
    trlx.train(config=config, metric_fn=length, **DATA["PPO"] | {"reward_fn": reward})


@pytest.mark.parametrize(
    ("number", "asked", "hanging", "code", "call", "train"),
    [
        (signal.SIGTERM, 0, 0, 75, 5, {}),
        (signal.SIGTERM, 1, 0, 75, 5, {}),
        (signal.SIGINT, 0, 1, 1, 3, {"reward_on": "each_rank"}),  # this process scores no evaluations
        (signal.SIGUSR1, 3, 0, 75, 5, MEGATRON),
    ],
)
def test_a_signal_while_the_reward_hangs_saves_and_ends_all(tmp_path, number, asked, hanging, code, call, train):
    job = start(4 if train is MEGATRON else 2, hangs, tmp_path, hanging, call, train)
    deadline = time.monotonic() + 120
    while not (tmp_path / "hangs").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(job[asked].pid, number)
    assert ends(job, 60) == [code] * len(job)
    folder = checkpoint.newest(tmp_path)
    assert checkpoint.read_state(folder)[0]["schedule"]["step"] == 4
    told = f"The last checkpoint is {folder}, of step 4; to go on from there: train.resume_from_checkpoint=auto"
    assert said(tmp_path, 0).endswith(f"{told}\n") and "trlx/trainer" not in said(tmp_path, 0)
