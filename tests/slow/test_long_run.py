"""A run of 2,000 steps keeps its memory, its threads and its open files."""

import os
import threading

import psutil
import pytest

import trlx
from tests.runs import PROMPTS, share_of_a, tiny_config
from trlx import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 2000
SAMPLED = (200, 500, 1000, 1500, STEPS)
GROWTH = 4 * 2**20
"""Bytes that a run may grow by from step 200 on, where 0.5 MiB were measured: less than 2.5 KB a step."""


@pytest.mark.parametrize("in_background", [True, False])
def test_2000_steps_of_ppo_with_evaluations_and_checkpoints_leave_memory_threads_and_files_as_they_were(
    tmp_path, monkeypatch, in_background
):
    found, process = {}, psutil.Process()

    def metric(samples, step, **kwargs):
        if step in SAMPLED:
            names = sorted(thread.name for thread in threading.enumerate() if thread.name != "trlx-checkpoint")
            found[step] = process.memory_info().rss, len(names), len(os.listdir("/proc/self/fd"))
        return {"length": [len(sample) for sample in samples]}

    config = tiny_config(
        tmp_path,
        "PPO",
        train={
            "total_steps": STEPS,
            "epochs": STEPS,
            "eval_interval": 100,
            "checkpoint_interval": 20,
            "keep_checkpoints": 2,
            "async_save": in_background,
        },
    )
    trlx.train(config=config, reward_fn=share_of_a, prompts=PROMPTS, metric_fn=metric)
    for step in SAMPLED:
        print(f"step {step}: {found[step][0] / 2**20:.1f} MiB, {found[step][1]} threads, {found[step][2]} files")
    memory, threads, files = zip(*(found[step] for step in SAMPLED), strict=True)
    assert max(memory) - memory[0] < GROWTH
    assert max(threads) == threads[0] and max(files) <= files[0] + 2  # a checkpoint that is being written
    assert len(checkpoint.checkpoints(tmp_path)) == 2
