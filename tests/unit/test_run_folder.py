"""A folder belongs to one run at a time, says what to go on from, and keeps as many checkpoints as asked."""

import fcntl
import logging
import os

import pytest

import trlx
from tests.runs import tiny_config
from tests.unit.test_checkpoint import write
from tests.unit.test_resume import names
from trlx import checkpoint
from trlx.run import folder as run_folder
from trlx.run.folder import LOCK_FILE, locked, rotate, to_resume
from trlx.strict import ConfigError


def in_a_child(fn, *args):
    """What `fn` returns, a small number, in a forked process, which does nothing else."""
    child = os.fork()
    if child == 0:
        os._exit(fn(*args))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refused(folder):
    """Whether the folder belongs to a run already."""
    try:
        with locked(folder):
            return False
    except RuntimeError:
        return True


def test_a_folder_that_a_run_writes_into_is_locked_against_a_second_one(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            assert in_a_child(refused, tmp_path)
            with pytest.raises(RuntimeError) as found, locked(tmp_path):  # a second run in this process is no better
                pass
        assert str(found.value).startswith(f"{tmp_path} is written into by another run, process {os.getpid()} on ")
        assert "set train.checkpoint_dir" in str(found.value) and str(tmp_path / LOCK_FILE) in str(found.value)
    assert not in_a_child(refused, tmp_path) and not refused(tmp_path)


def test_a_folder_that_cannot_be_used_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "SFT", model={"model_path": "nomodel"})
    with locked(tmp_path), pytest.raises(RuntimeError, match="is written into by another run"):
        trlx.train(samples=["ab"], config=config)
    with locked(tmp_path, fcntl.LOCK_SH), pytest.raises(OSError, match="No model"):  # another process of the same job
        trlx.train(samples=["ab"], config=config)
    (tmp_path / "file").touch()
    for name in ("checkpoint_dir", "logging_dir"):
        there = config.evolve(train={name: str(tmp_path / "file" / "run")})
        with pytest.raises(
            ValueError, match=f"train.{name} is .*/file/run, but .*/file is a file: name another folder"
        ):
            trlx.train(samples=["ab"], config=there)
    monkeypatch.setattr(os, "access", lambda path, how: (path, how) != (tmp_path, os.W_OK))
    with pytest.raises(
        ValueError, match=f"train.checkpoint_dir is .*/new, but {tmp_path} cannot be written into: name"
    ):
        trlx.train(samples=["ab"], config=config.evolve(train={"checkpoint_dir": str(tmp_path / "new")}))
    assert names(tmp_path) == [LOCK_FILE, "file"]


def test_a_folder_is_locked_as_long_as_its_run_lasts(tmp_path):
    found = []
    metric = {"metric_fn": lambda samples: found.append(refused(tmp_path)) or {}}
    config = tiny_config(tmp_path, "SFT", train={"total_steps": 1})
    trlx.train(samples=["ab"], eval_prompts=["a"], config=config, **metric)
    assert found == [True, True] and not refused(tmp_path)


def test_a_child_that_outlives_a_killed_run_does_not_keep_its_lock(tmp_path):
    with locked(tmp_path):
        (file,) = run_folder._held
        assert in_a_child(lambda: file.closed) and not file.closed


def test_a_file_system_without_locks_is_worked_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert not refused(tmp_path)
    assert f"{tmp_path} cannot be locked ([Errno 37] No locks available)" in caplog.text


def test_what_a_run_is_asked_to_go_on_from(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="trlx")
    mine, other, empty, model = (tmp_path / name for name in ("mine", "other", "empty", "model"))
    for folder in (mine, empty, model):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    for step in (4, 8):
        write(other / f"checkpoint_{step}", step)
    afresh = [None, "auto", str(mine), str(empty), str(tmp_path / "nowhere")]
    assert [to_resume(wanted, mine) for wanted in afresh] == [None] * 5
    for said in (f"No checkpoint under {mine}: starting afresh", f"nothing at {tmp_path / 'nowhere'} yet, starting"):
        assert said in caplog.text
    assert to_resume(str(other), mine) == other / "checkpoint_8"
    assert to_resume(str(other / "checkpoint_4"), mine) == other / "checkpoint_4"
    # a run killed before its first checkpoint has written something
    (mine / "metrics.jsonl").write_text("{}")
    assert to_resume("auto", mine) is None and to_resume(str(mine), mine) is None
    write(mine / "checkpoint_2", 2)
    assert to_resume("auto", mine) == to_resume(str(mine), mine) == mine / "checkpoint_2"
    write(model / "itself", 3)  # a checkpoint, where "auto" asks for a folder of them
    assert to_resume(str(model / "itself"), mine) == model / "itself" and to_resume("auto", model / "itself") is None
    for wanted in (model, model / "config.json"):
        with pytest.raises(ValueError, match=rf"{wanted} holds no checkpoint .* write it as model.model_path"):
            to_resume(str(wanted), mine)


def rotated(folder, keep, wanted=None, last=9):
    """The names left of checkpoints 2, 3, 10 and the one just written when `keep` of them are."""
    for step in (2, 3, 10, last):
        write(folder / f"checkpoint_{step}", step)
    write(folder / "best_checkpoint", 1)
    train = tiny_config(folder, "SFT", train={"keep_checkpoints": keep, "resume_from_checkpoint": wanted}).train
    rotate(folder / f"checkpoint_{last}", train)
    return sorted(path.name.removeprefix("checkpoint_") for path in folder.iterdir())


def test_the_newest_checkpoints_are_kept_and_with_them_the_best_and_the_last(tmp_path):
    assert rotated(tmp_path / "all", None) == ["10", "2", "3", "9", "best_checkpoint"]
    assert rotated(tmp_path / "two", 2) == ["10", "9", "best_checkpoint"]
    # written after another one of a later step
    assert rotated(tmp_path / "one", 1) == ["10", "9", "best_checkpoint"]
    assert rotated(tmp_path / "named", 2, str(tmp_path / "named" / "checkpoint_2")) == [
        "10",
        "2",
        "9",
        "best_checkpoint",
    ]
    assert rotated(tmp_path / "more", 7) == ["10", "2", "3", "9", "best_checkpoint"]


def test_a_checkpoint_that_cannot_be_deleted_stops_no_run(tmp_path, monkeypatch, caplog):
    def refuse(folder, *where):
        raise PermissionError("not yours")

    rotated(tmp_path, None)
    monkeypatch.setattr(checkpoint, "remove", refuse)
    rotate(tmp_path / "checkpoint_9", tiny_config(tmp_path, "SFT", train={"keep_checkpoints": 2}).train)
    assert len(checkpoint.checkpoints(tmp_path)) == 4
    assert "checkpoint_2, which train.keep_checkpoints does not keep, could not be deleted: not yours" in caplog.text


@pytest.mark.parametrize("name", ["keep_checkpoints", "checkpoint_interval"])
def test_numbers_of_checkpoints_are_at_least_1_or_null(tmp_path, name):
    assert getattr(tiny_config(tmp_path, "SFT", train={name: None}).train, name) is None
    with pytest.raises(ConfigError, match=f"train.{name} must be at least 1, or null, got 0"):
        tiny_config(tmp_path, "SFT", train={name: 0})
