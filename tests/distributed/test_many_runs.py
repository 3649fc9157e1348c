"""Many runs in one process: what one of them needed is given back when the next one begins."""

from __future__ import annotations

import gc
import os

import pytest

from tests.builders import tiny_gpt2_config
from tests.processes import together
from tests.runs import run
from trlx.trainer.base import Trainer

pytestmark = pytest.mark.distributed

TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


def tiny(trainer, folder, layout, steps=1):
    """PPO, whose rewards come from a thread of their own."""
    method = {"num_rollouts": 2, "chunk_size": 2, "ppo_epochs": 1, "gen_kwargs": {"max_new_tokens": 1}}
    train = {"trainer": trainer, "trainer_kwargs": layout, "total_steps": steps, "batch_size": 2, "save_best": False}
    return run("PPO", folder, method=method, train=train, model={"model_path": tiny_gpt2_config()})


def held():
    """What this process holds: threads, open files, trainers."""
    gc.collect()
    trainers = sum(isinstance(each, Trainer) for each in gc.get_objects())
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), trainers


def thirty(trainer, folder, layouts):
    early, late = range(3, 6), range(27, 30)
    found = {}
    for number in range(30):
        layout = layouts[number % len(layouts)]
        tiny(trainer, folder / str(number), layout, steps=int(number in (*early, *late)))
        if number in (*early, *late):
            found[number] = held()
    for first, last in zip(early, late, strict=True):
        # connections come and go; one thread or file left by each run would be 24
        assert all(after - before < 12 for before, after in zip(found[first], found[last], strict=True)), found
    assert [trainers for *_, trainers in found.values()] == [0] * 6


def test_thirty_runs_on_accelerate_hold_no_more_than_the_first(tmp_path):
    together(1, thirty, "AcceleratePPOTrainer", tmp_path, [{}])


def test_thirty_runs_in_two_layouts_on_megatron_hold_no_more_than_the_first(tmp_path):
    together(2, thirty, "NeMoPPOTrainer", tmp_path, [TENSOR, TENSOR, PIPELINE])


def side_by_side(folder):
    """Trainers of one layout share its processes; those of another take them."""
    first = tiny("NeMoPPOTrainer", folder / "first", TENSOR)
    before = first.generate([[4, 5]], do_sample=False).tolist()
    with pytest.raises(ValueError, match="Prompt 0 has 64 tokens, which with max_new_tokens=1 are more than the 64"):
        first.generate([[4] * 64])
    tiny("NeMoPPOTrainer", folder / "second", TENSOR)
    assert first.generate([[4, 5]], do_sample=False).tolist() == before
    first.save_pretrained(folder / "exported")
    tiny("NeMoPPOTrainer", folder / "third", PIPELINE)
    for use in (lambda: first.generate([[4, 5]]), lambda: first.save_pretrained(folder / "again")):
        with pytest.raises(RuntimeError, match="use this trainer before you build the next one"):
            use()


def test_a_trainer_serves_until_one_of_another_layout_takes_its_processes(tmp_path):
    together(2, side_by_side, tmp_path)
