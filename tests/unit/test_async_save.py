"""Checkpoints that are written while training goes on are those that would be written at once, and as safe."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from tests.runs import metrics, run, weights
from tests.unit.test_checkpoint import killed_at_every_instant, nothing, step_of, write
from tests.unit.test_resume import sft
from trlx import background, checkpoint
from trlx.backends import distress
from trlx.backends.accelerate import AccelerateBackend
from trlx.background import Background
from trlx.registry import trainers
from trlx.run.saving import Saver

ASYNC = {"async_save": True}


class Late(Background):
    """Does everything as late as possible: when it is waited for."""

    def __init__(self):
        self.work = []

    def start(self, work):
        self.work.append(work)

    def wait(self):
        while self.work:
            self.work.pop(0)()


def files(folder):
    """The contents of a checkpoint's files by name, without settings and the length of a file with times."""
    found = {str(path.relative_to(folder)): contents(path) for path in folder.rglob("*") if path.is_file()}
    state = checkpoint.read_state(folder, tensors=False)[0]
    del state["tracker"]
    return found | {checkpoint.STATE_FILE: state}


def contents(path):
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="np") as file:  # which writes entries in any order
        told = file.metadata() or {}
        told.pop("python", None)  # modules draw from python's generator when a process first imports them
        return told, {name: file.get_tensor(name).tobytes() for name in file.keys()}


@pytest.mark.parametrize("algorithm", ["PPO", "ILQL"])
def test_a_checkpoint_written_after_further_steps_is_that_of_its_own_step(tmp_path, monkeypatch, algorithm):
    # at step 3 rollouts are in hand, whose columns are saved, too
    train = {"checkpoint_interval": 3, "eval_interval": 4, "total_steps": 4}
    run(algorithm, tmp_path / "at_once", train=train)
    monkeypatch.setattr("trlx.run.saving.Background", Late)
    run(algorithm, tmp_path / "late", train={**train, **ASYNC})
    for name in ["checkpoint_3", "checkpoint_4", "best_checkpoint"][: 3 if algorithm == "PPO" else 2]:
        expected, found = files(tmp_path / "at_once" / name), files(tmp_path / "late" / name)
        assert expected.keys() == found.keys()
        assert [file for file in expected if expected[file] != found[file]] == []


def test_a_run_that_a_signal_stops_waits_for_its_checkpoint_and_goes_on_from_there(tmp_path, monkeypatch, caplog):
    run("PPO", tmp_path / "whole")
    started, update, flush = threading.Event(), AccelerateBackend.train_step, checkpoint._flush

    def signalled(self, *args):
        if self.scheduler.last_epoch == 4:  # after the checkpoint of step 4 was begun
            signal.raise_signal(signal.SIGTERM)
            started.set()
        return update(self, *args)

    def held(*paths):
        started.wait(60)
        flush(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(AccelerateBackend, "train_step", signalled)
        patched.setattr(checkpoint, "_flush", held)
        with pytest.raises(SystemExit) as stopped:
            run("PPO", tmp_path / "stopped", train={**ASYNC, "save_best": False})
    assert stopped.value.code == 75 and "Stopped at step 5 by SIGTERM. The last checkpoint is" in caplog.text
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "stopped")] == ["checkpoint_4", "checkpoint_5"]
    run("PPO", tmp_path / "stopped", train={**ASYNC, "resume_from_checkpoint": "auto"})
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert background.WRITER not in [thread.name for thread in threading.enumerate()]


def full_disk_at(call, monkeypatch):
    """The disk is full whenever something is flushed from the `call`th time on. Returns what ends that."""
    calls, flush = [], checkpoint._flush

    def flushed(*paths):
        calls.append(1)
        if len(calls) >= call:
            raise OSError(28, "No space left on device")
        flush(*paths)

    monkeypatch.setattr(checkpoint, "_flush", flushed)


@pytest.mark.parametrize("asked", [True, False])
def test_a_disk_that_is_full_ends_the_run_with_the_same_words(tmp_path, monkeypatch, asked):
    full_disk_at(3, monkeypatch)  # each checkpoint is flushed, and then its name
    train = {"checkpoint_interval": 2, "eval_interval": 100, "async_save": asked}
    with pytest.raises(OSError, match="No space left on device") as stopped:
        run("SFT", tmp_path, train={**train, "save_best": False})
    last = tmp_path / "checkpoint_2"
    told = f"The last checkpoint is {last}, of step 2; to go on from there: train.resume_from_checkpoint=auto"
    # the checkpoint of step 4 fails: in the background, the next one finds out
    assert stopped.value.__notes__ == [f"Step {6 if asked else 4} is not saved. {told}"]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint_2"]


def test_a_checkpoint_that_fails_in_the_background_at_the_end_is_tried_again(tmp_path, monkeypatch, caplog):
    fails, flush = iter([True]), checkpoint._flush
    monkeypatch.setattr(checkpoint, "_flush", lambda *paths: flush(*paths) if not next(fails, False) else 1 / 0)
    with pytest.raises(ZeroDivisionError) as stopped:
        run("SFT", tmp_path, train={"checkpoint_interval": 100, "eval_interval": 100, "save_best": False, **ASYNC})
    assert stopped.value.__notes__[0].startswith(f"The last checkpoint is {tmp_path / 'checkpoint_8'}, of step 8")


def test_a_kill_at_any_instant_of_writing_in_the_background_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    def act(folder):
        work = Background()
        for step in (8, 9):
            with checkpoint.replacing(folder / "checkpoint_8", True, nothing, work) as temporary:
                weights = {"w": torch.tensor([float(step)])}
                background.write(
                    lambda copies: (temporary / "weights").write_text(f"of step {int(copies['w'])}"), weights
                )
                weights["w"].zero_()
                checkpoint.write_state(temporary, {"schedule": {"step": step}}, {})
            work.wait()

    def check(folder):
        assert step_of(checkpoint.newest(folder)) in (7, 8, 9)
        checkpoint.tidy(folder)
        assert [path.name for path in folder.iterdir()] == ["checkpoint_8"]

    killed_at_every_instant(tmp_path, monkeypatch, lambda folder: write(folder / "checkpoint_8", 7), act, check, 12)


def test_work_is_done_in_order_and_none_after_an_error_until_it_is_told():
    done, work, gate = [], Background(), threading.Event()
    work.start(gate.wait)
    work.start(lambda: done.append(1))
    work.start(lambda: 1 / 0)
    work.start(lambda: done.append(2))
    assert done == []
    gate.set()
    with pytest.raises(ZeroDivisionError):
        work.wait()
    assert done == [1]
    work.start(lambda: done.append(3))
    work.wait()
    assert done == [1, 3]


def test_tied_weights_are_copied_once_and_what_memory_does_not_hold_is_written_at_once(monkeypatch):
    weight, square, freed, written = torch.ones(2), torch.tensor([[1, 2], [3, 4]]), torch.ones(2), []
    alive = weakref.ref(freed)
    with background.postponed() as writes:
        background.write(
            written.append,
            {"a": weight, "b": weight, "part": weight[:1], "square": square, "turned": square.t(), "freed": freed},
        )
        del freed
        assert alive() is not None  # else the next tensor may have its address
        monkeypatch.setattr(background.psutil, "virtual_memory", lambda: SimpleNamespace(available=15))
        background.write(written.append, {"a": weight})
    assert len(written) == len(writes) == 1 and written[0]["a"] is weight
    weight.zero_()
    writes[0]()
    assert written[1]["a"] is written[1]["b"] and written[1]["a"].tolist() == [1, 1] and len(written[1]["part"]) == 1
    assert written[1]["turned"].tolist() == [[1, 3], [2, 4]] != written[1]["square"].tolist()


def test_the_best_checkpoint_shares_files_with_the_one_of_its_step_unless_the_disk_has_no_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(95, "Operation not supported")

    for folder, asked in (("linked", False), ("later", True), ("copied", False)):
        with monkeypatch.context() as patched:
            if folder == "copied":
                patched.setattr(os, "link", refuse)
            sft(tmp_path / folder, [0.0, 1.0, 0.5], total_steps=2, async_save=asked)
        best, own, other = (tmp_path / folder / name for name in ("best_checkpoint", "checkpoint_1", "checkpoint_2"))
        assert files(best) == files(own) and files(best).keys() == files(other).keys()
        assert {os.path.samefile(best / name, own / name) for name in files(best)} == {folder != "copied"}
        assert not any(os.path.samefile(best / name, other / name) for name in files(best))


def test_a_save_that_is_overridden_is_called_and_returns_when_the_checkpoint_is_there(tmp_path, monkeypatch):
    found = []

    class Trainer(trainers.get("AccelerateSFTTrainer")):
        def save(self, directory=None):
            super().save(directory)
            found.append(checkpoint.step_of(checkpoint.newest(tmp_path) if directory is None else directory))

    monkeypatch.setitem(trainers._classes, "acceleratesfttrainer", ("Trainer", Trainer))
    trainer = sft(tmp_path, [0.0, 1.0, 0.5], total_steps=2, async_save=True)
    assert found == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="holds other things than one checkpoint, which would be deleted"):
        trainer.save(tmp_path)
    assert len(checkpoint.checkpoints(tmp_path)) >= 2


def test_a_process_that_ends_because_of_another_ones_error_first_writes_its_checkpoint(monkeypatch):
    work, gate, ended = Background(), threading.Event(), []
    watch = distress.Watch.__new__(distress.Watch)
    watch._rank, watch._ending = 0, threading.Event()
    monkeypatch.setattr(distress, "GRACE", 0)
    monkeypatch.setattr(os, "_exit", lambda code: ended.append((code, list(written))))
    written = []
    work.start(lambda: written.append(gate.wait(10)))
    threading.Timer(0.1, gate.set).start()
    watch._leave("process 1 failed")
    assert ended == [(1, [True])]


def test_where_weights_are_sharded_a_wish_for_the_background_is_refused():
    backend = SimpleNamespace(can_copy_weights=False, device=torch.device("cuda"))
    trainer = SimpleNamespace(backend=backend, config=SimpleNamespace(train=SimpleNamespace(async_save=None)))
    assert Saver(trainer)._background is None
    trainer.config.train.async_save = True
    with pytest.raises(ValueError, match=r"train\.async_save needs a process that holds all weights"):
        Saver(trainer)
    backend.can_copy_weights = True
    assert Saver(trainer)._background is not None
    trainer.config.train.async_save = None
    assert Saver(trainer)._background is not None
    backend.device = torch.device("cpu")
    assert Saver(trainer)._background is None
