"""A checkpoint is whole or not there, and gives back exactly what went in."""

import json
import random

import numpy as np
import pytest
import torch

from trlx import checkpoint
from trlx.batch import TokenBatch
from trlx.checkpoint import RandomState, TrainerState


def nothing():
    pass


def write(target, step):
    with checkpoint.replacing(target, True, nothing) as folder:
        checkpoint.write_state(folder, TrainerState(step=step), {})


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "checkpoint_1"
    with checkpoint.replacing(target, True, nothing) as folder:
        (folder / "part").write_text("x")
        assert not target.exists()
    assert (target / "part").read_text() == "x" and list(tmp_path.iterdir()) == [target]


def test_a_failure_while_writing_leaves_the_previous_checkpoint(tmp_path):
    target = tmp_path / "best_checkpoint"
    write(target, 1)
    with pytest.raises(KeyboardInterrupt), checkpoint.replacing(target, True, nothing) as folder:
        (folder / "part").write_text("x")
        raise KeyboardInterrupt
    assert checkpoint.read_state(checkpoint.existing(target))[0].step == 1
    write(target, 2)
    assert checkpoint.read_state(checkpoint.existing(target))[0].step == 2


def test_a_kill_between_the_two_renames_leaves_a_readable_checkpoint(tmp_path):
    target = tmp_path / "checkpoint_08"
    write(target, 8)
    target.rename(checkpoint._displaced(target))
    assert checkpoint.read_state(checkpoint.existing(target))[0].step == 8
    assert checkpoint.newest(tmp_path) == checkpoint._displaced(target)


def test_the_newest_checkpoint_is_the_one_with_the_highest_step(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for step in (2, 10, 9):
        write(tmp_path / f"checkpoint_{step}", step)
    (tmp_path / "checkpoint_11").mkdir()  # never finished: no state file
    (tmp_path / ".checkpoint_12.writing").mkdir()
    write(tmp_path / "best_checkpoint", 99)
    assert checkpoint.newest(tmp_path).name == "checkpoint_10"


def test_a_missing_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        checkpoint.existing(tmp_path / "nowhere")


def test_trainer_state_comes_back_equal(tmp_path):
    state = TrainerState(step=3, epoch=1, best_reward=0.1 + 0.2, method={"coef": 1 / 3}, tracker={"bytes": 10})
    checkpoint.write_state(tmp_path, state, {"data": "abc"})
    assert checkpoint.read_state(tmp_path) == (state, {"data": "abc"})


def test_differences_name_what_would_change_the_numbers_and_nothing_else():
    saved = {"config": {"train": {"seed": 1, "eval_interval": 5}, "method": {"gamma": 0.9}}, "data": "a"}
    current = {"config": {"train": {"seed": 2, "eval_interval": 9}, "method": {"gamma": 0.9}}, "data": "b"}
    assert checkpoint.differences(saved, current) == ["config.train.seed: 1 then, 2 now", "data: 'a' then, 'b' now"]


def test_rollouts_come_back_equal(tmp_path):
    batch = TokenBatch(
        torch.tensor([[1, 2]]), torch.tensor([[True, True]]), torch.tensor([[False, True]]), torch.rand(1, 2)
    )
    checkpoint.write_rollouts(tmp_path, batch.replace(old_values=torch.rand(2, 1).T))
    again = checkpoint.read_rollouts(tmp_path)
    assert again.ref_logprobs is None and torch.equal(again.scores, batch.scores)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path, kind):
    def fresh():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3)
        return layer, kind(layer.parameters(), lr=0.1, weight_decay=0.1)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.arange(3.0)).square().sum().backward()
        optimizer.step()

    layer, optimizer = fresh()
    step(layer, optimizer)
    checkpoint.write_optimizer(tmp_path / "o.safetensors", optimizer.state_dict())
    other, resumed = fresh()
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(checkpoint.read_optimizer(tmp_path / "o.safetensors"))
    step(layer, optimizer)
    step(other, resumed)
    assert torch.equal(layer.weight, other.weight)


def test_random_numbers_go_on_where_they_were(tmp_path):
    checkpoint.seed_everything(5)
    random.gauss(0, 1), np.random.standard_normal(), torch.rand(1)
    RandomState.capture().write(tmp_path, "00003")
    first = random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()
    checkpoint.seed_everything(6)
    RandomState.read(tmp_path, "00003").restore()
    assert (random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()) == first
    assert RandomState.read(tmp_path, "00004") is None


def test_own_randomness_is_the_same_each_time_and_disturbs_nothing():
    checkpoint.seed_everything(5)
    expected = [random.random(), float(torch.rand(1))]
    checkpoint.seed_everything(5)
    with checkpoint.own_randomness(1):
        inside = random.random(), float(torch.rand(1))
    assert [random.random(), float(torch.rand(1))] == expected
    with checkpoint.own_randomness(1):
        assert (random.random(), float(torch.rand(1))) == inside


def test_the_state_file_is_plain_json(tmp_path):
    write(tmp_path / "checkpoint_1", 1)
    assert json.loads((tmp_path / "checkpoint_1" / checkpoint.STATE_FILE).read_text())["state"]["step"] == 1
