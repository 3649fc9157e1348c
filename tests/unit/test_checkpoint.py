"""A checkpoint is whole or not there, and gives back exactly what went in."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from trlx import checkpoint
from trlx.batch import TokenBatch
from trlx.checkpoint import RandomState


def nothing():
    pass


def write(target, step):
    with checkpoint.replacing(target, True, nothing) as folder:
        (folder / "weights").write_text(f"of step {step}")
        checkpoint.write_state(folder, {"schedule": {"step": step}}, {})


def step_of(folder):
    """The step of a checkpoint of which nothing is missing."""
    step = checkpoint.read_state(folder)[0]["schedule"]["step"]
    assert (folder / "weights").read_text() == f"of step {step}"
    return step


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


CHANGES = ("rename", "unlink", "rmdir", "mkdir")
"""What changes a folder; `shutil.rmtree` is made of these."""


def kill_before(monkeypatch, number):
    """Makes the change of a folder with that number, from 0, the end of the process."""
    left = [number]

    def dying(real):
        def change(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args, **kwargs)

        return change

    for name in CHANGES:
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


def killed_at_every_instant(tmp_path, monkeypatch, prepare, act, check, least):
    """Does `act(folder)` again and again, killed one change of a folder later each time, and checks what is left."""
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepare(folder)
        with monkeypatch.context() as patch:
            kill_before(patch, number)
            try:
                act(folder)
            except Killed:
                pass
            else:
                assert number >= least, "the kills did not reach the changes"
                return
        check(folder)
    raise AssertionError("never came to an end")


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
    assert step_of(checkpoint.existing(target)) == 1
    write(target, 2)
    assert step_of(checkpoint.existing(target)) == 2 and list(tmp_path.iterdir()) == [target]


def test_a_kill_at_any_instant_of_a_replacement_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    found = set()

    def check(folder):
        target = folder / "checkpoint_08"
        found.add(checkpoint.existing(target).name)
        assert step_of(checkpoint.existing(target)) == 8
        assert step_of(checkpoint.newest(folder)) == 8
        # the next run tidies up, and its kills are no worse
        checkpoint.tidy(folder)
        assert [path.name for path in folder.iterdir()] == ["checkpoint_08"] and step_of(target) == 8

    def prepare(folder):
        write(folder / "checkpoint_08", 8)

    killed_at_every_instant(tmp_path, monkeypatch, prepare, lambda folder: write(folder / "checkpoint_08", 8), check, 6)
    assert found == {"checkpoint_08", ".checkpoint_08.replaced"}


def test_a_kill_at_any_instant_of_tidying_or_deleting_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    def prepare(folder):
        for step in (3, 8, 9):
            write(folder / f"checkpoint_{step}", step)
        write(folder / ".checkpoint_8.replaced", 8)
        (folder / "checkpoint_9").rename(folder / ".checkpoint_9.replaced")
        (folder / ".best_checkpoint.writing").mkdir()

    def act(folder):
        checkpoint.tidy(folder)
        checkpoint.remove(folder / "checkpoint_3")

    def check(folder):
        found = checkpoint.checkpoints(folder)
        assert [step_of(path) for path in found][-2:] == [8, 9] and found[-2].name == "checkpoint_8"

    killed_at_every_instant(tmp_path, monkeypatch, prepare, act, check, 12)


def test_what_is_half_deleted_is_never_chosen_beside_a_whole_checkpoint(tmp_path):
    for step in range(8):  # in which order a file system lists the two is its own affair
        whole, half = tmp_path / str(step) / f"checkpoint_{step}", tmp_path / str(step) / f".checkpoint_{step}.replaced"
        write(whole, step)
        write(half, step)
        (half / "weights").unlink()  # its state file is still there
        assert checkpoint.newest(tmp_path / str(step)) == whole


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name_and_before_the_old_one_goes(tmp_path, monkeypatch):
    target, done = tmp_path / "checkpoint_1", []
    write(target, 1)

    def flushed(descriptor):
        done.append(("flushed", os.readlink(f"/proc/self/fd/{descriptor}")))

    def renamed(old, new, rename=os.rename):
        done.append(("renamed", Path(old).name))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    with checkpoint.replacing(target, True, nothing) as folder:
        (folder / "hf_model").mkdir()
        (folder / "hf_model" / "weights").write_text("x")
        checkpoint.write_state(folder, {}, {})
    files = [".", checkpoint.STATE_FILE, "hf_model", "hf_model/weights"]
    assert set(done[:4]) == {("flushed", os.path.normpath(folder / file)) for file in files}
    names = [Path(path).name for _, path in done[4:]]
    assert names == ["checkpoint_1", ".checkpoint_1.writing", tmp_path.name, ".checkpoint_1.replaced"]


def test_every_process_has_its_machine_write_what_it_wrote(tmp_path, monkeypatch):
    target, flushed = tmp_path / "checkpoint_1", []
    (tmp_path / ".checkpoint_1.writing").mkdir()  # by the main process
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.readlink(f"/proc/self/fd/{number}")))
    with checkpoint.replacing(target, False, nothing) as folder:
        (folder / "policy-001").write_text("x")
    assert set(flushed) == {str(folder), str(folder / "policy-001")} and not target.exists()


@pytest.mark.parametrize("kind", ["other files", "a file", "a run"])
def test_only_a_checkpoint_is_replaced(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "a file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    if kind == "a run":  # a checkpoint was saved into it before it was used as train.checkpoint_dir
        checkpoint.write_state(target, {}, {})
        write(target / "checkpoint_1", 1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"target .*: name a new folder, for example .*target-saved"):
        checkpoint.check_replaceable(target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_an_empty_folder_and_nothing_are_replaced(tmp_path):
    write(tmp_path / "old", 1)
    (tmp_path / "empty").mkdir()
    for name in ("old", "empty", "new"):
        checkpoint.check_replaceable(tmp_path / name)
        write(tmp_path / name, 2)
        assert step_of(tmp_path / name) == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_the_newest_checkpoint_is_the_one_with_the_highest_step(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for step in (2, 10, 9):
        write(tmp_path / f"checkpoint_{step}", step)
    (tmp_path / "checkpoint_11").mkdir()  # never finished: no state file
    (tmp_path / ".checkpoint_12.writing").mkdir()
    write(tmp_path / "best_checkpoint", 99)
    write(tmp_path / "earlier.1" / "checkpoint_98", 98)
    assert checkpoint.newest(tmp_path).name == "checkpoint_10"


def test_a_missing_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        checkpoint.existing(tmp_path / "nowhere")


def test_trainer_state_comes_back_equal(tmp_path):
    state = {"schedule": {"step": 3}, "best_reward": 0.1 + 0.2, "kl": {"coef": 1 / 3}, "history": [[[1, 2], [3], 0.5]]}
    checkpoint.write_state(tmp_path, state, {"data": "abc"})
    assert checkpoint.read_state(tmp_path) == (state, {"data": "abc"})


def test_rollouts_come_back_equal(tmp_path):
    mask = torch.tensor([[False, True], [False, True]])
    batch = TokenBatch(torch.tensor([[1, 2], [3, 4]]), mask | True, mask, torch.rand(2, 2))
    batch = batch.replace(old_values=torch.rand(2, 2).T)
    assert not batch.old_values.is_contiguous()
    checkpoint.write_state(tmp_path, {"rollouts": batch.columns()}, {})
    again = TokenBatch(**checkpoint.read_state(tmp_path)[0]["rollouts"])
    assert again.ref_logprobs is None and torch.equal(again.scores, batch.scores)
    assert torch.equal(again.old_values, batch.old_values)


def test_tensors_come_back_to_where_they_were_however_deep(tmp_path):
    state = {name: {"average": {"of": torch.tensor([number])}} for name, number in (("first", 1.0), ("second", 2.0))}
    checkpoint.write_state(tmp_path, state, {})
    again, _ = checkpoint.read_state(tmp_path)
    assert [again[name]["average"]["of"].item() for name in ("first", "second")] == [1.0, 2.0]


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
    assert json.loads((tmp_path / "checkpoint_1" / checkpoint.STATE_FILE).read_text())["state"]["schedule"]["step"] == 1
