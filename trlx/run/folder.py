"""The folder that a run writes into: what it goes on from, what it moves out of the way, what it deletes.

While a run writes into a folder no other one can, and what an earlier run left there is never written over.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from trlx import checkpoint, logging
from trlx.config import TrainConfig
from trlx.run import Run
from trlx.tracking import RUN_FILES, set_aside

logger = logging.get_logger(__name__)

LOCK_FILE = ".lock"
BEST = "best_checkpoint"
MANY_STEPS = 999_999
"""Taken for the last step where nobody knows it."""

_held: set[IO] = set()


@contextmanager
def opened(trainer: Run) -> Iterator[bool]:
    """Locks ``train.checkpoint_dir`` while the block runs, and puts `trainer` where it is to go on from.

    What else an earlier run has left there moves to ``earlier.<number>`` in it. Called on every process.

    Yields:
        Whether the run goes on, from a checkpoint or from where an earlier call of ``learn`` ended.

    Raises:
        RuntimeError: another process writes into the folder.
        ValueError: a folder cannot be written into, ``train.resume_from_checkpoint`` holds no checkpoint, or the model
            that the run starts from lies among what would be moved.
    """
    folder = Path(trainer.config.train.checkpoint_dir)
    with ExitStack() as stack:
        source = trainer.backend.on_main(lambda: _claim(trainer.config.train, stack))
        if source is not None:
            trainer.load(source)
            logger.info(f"Resumed {source} at step {trainer.schedule.step} of {trainer.total_steps}")
        resumed = trainer.run_folder is not None
        best = trainer.backend.on_main(lambda: _make_room(folder, trainer))
        trainer.run_folder = folder.resolve()
        rewards = [reward for reward in (trainer.best_reward, best) if reward is not None]
        trainer.best_reward = max(rewards, default=None)
        try:
            yield resumed
        finally:
            if trainer.tracker is not None:
                trainer.tracker_state = trainer.tracker.last_state


def place(train: TrainConfig, step: int, last_step: int | None) -> Path:
    """The folder of a step's checkpoint; as many digits as the last step has put folders in order."""
    last = last_step or MANY_STEPS if train.total_steps is None else train.total_steps
    return Path(train.checkpoint_dir) / f"checkpoint_{step:0{len(str(last))}d}"


def rotate(written: Path, train: TrainConfig, is_main: bool = True) -> None:
    """Deletes the oldest checkpoints, as ``train.keep_checkpoints`` says, now that the one at `written` is whole.

    The one that ``train.resume_from_checkpoint`` names stays, so that the run can be started again as it was.
    """
    keep, spared = train.keep_checkpoints, {written.resolve(), Path(train.resume_from_checkpoint or written).resolve()}
    for path in checkpoint.checkpoints(written.parent)[:-keep] if keep and is_main else []:
        if path.resolve() in spared:
            continue
        try:
            checkpoint.remove(path)
        except OSError as error:
            logger.warning(f"{path}, which train.keep_checkpoints does not keep, could not be deleted: {error}")


def check_folders(train: TrainConfig) -> None:
    """Makes sure that a run can write into its folders, and that no other one does.

    Raises:
        ValueError: one of them is a file, or not writable.
        RuntimeError: another process writes into ``train.checkpoint_dir``.
    """
    for name in ("checkpoint_dir", "logging_dir", "rollout_logging_dir"):
        folder = Path(getattr(train, name) or train.checkpoint_dir).absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            problem = "cannot be written into" if there.is_dir() else "is a file"
            raise ValueError(f"train.{name} is {folder}, but {there} {problem}: name another folder")
    folder = Path(train.checkpoint_dir)
    if (folder / LOCK_FILE).exists():
        with locked(folder, fcntl.LOCK_SH):  # which all processes of a job may have at once
            pass


def _claim(train: TrainConfig, stack: ExitStack) -> Path | None:
    """Locks the folder until `stack` is closed, clears what kills left in it, and finds what to go on from."""
    check_folders(train)
    folder = Path(train.checkpoint_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(folder))
    checkpoint.tidy(folder)
    return to_resume(train.resume_from_checkpoint, folder)


@contextmanager
def locked(folder: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """While the block runs no other process enters it for the same folder. The system ends it when this one dies.

    Raises:
        RuntimeError: another process is in it.
    """
    with open(folder / LOCK_FILE, "a+") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"{folder} is written into by another run, {file.read()}: wait for its end, or set "
                f"train.checkpoint_dir to another folder (if its machine is lost, delete {folder / LOCK_FILE})"
            ) from None
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error}): see to it that no other run writes into it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def to_resume(wanted: str | None, folder: Path) -> Path | None:
    """The checkpoint that ``train.resume_from_checkpoint`` asks a run in `folder` to go on from; None: start afresh.

    Raises:
        ValueError: it names something else than a checkpoint or a folder of checkpoints.
    """
    if wanted is None:
        return None
    path = folder if wanted == "auto" else Path(wanted)
    found = checkpoint.newest(path) or (checkpoint.find(path) if wanted != "auto" else None)
    if found is not None:
        return found
    if path.resolve() == folder.resolve():
        logger.info(f"No checkpoint under {path}: starting afresh")
    elif not path.exists() or (path.is_dir() and not any(path.iterdir())):
        logger.warning(f"train.resume_from_checkpoint: there is nothing at {path} yet, starting afresh")
    else:
        raise ValueError(
            f"train.resume_from_checkpoint: {path} holds no checkpoint ({checkpoint.STATE_FILE} is not there): name a "
            "checkpoint, a folder that holds some, or auto. To start from a model, write it as model.model_path"
        )
    return None


def _make_room(folder: Path, trainer: Run) -> float | None:
    """Moves away what another run left in the folder, or this one after the step from which it goes on.

    Returns the reward of the best checkpoint that stays.
    """
    own = trainer.run_folder == folder.resolve()
    others = _later(folder, trainer.schedule.step) if own else _of_a_run(folder)
    _check_model(trainer, folder, others)
    aside = set_aside(folder, others)
    if aside is not None:
        whose = f"Checkpoints of later steps than {trainer.schedule.step}" if own else "What an earlier run left"
        found = checkpoint.newest(aside) or checkpoint.find(aside / BEST)
        hint = f"; to go on from there, set train.resume_from_checkpoint: {found}" if found else ""
        logger.warning(f"{whose} in {folder}: now in {aside}{hint}")
    best = checkpoint.find(folder / BEST)
    return checkpoint.read_state(best, tensors=False)[0]["best"][0] if best else None


def _later(folder: Path, step: int) -> list[str]:
    """The checkpoints of later steps; with them the best one if it is of a later step as well."""
    later = [path for path in checkpoint.checkpoints(folder) if _step(path) > step]
    best = checkpoint.find(folder / BEST)
    # without them it was written after the newest checkpoint, which is where this run goes on: it is its own best
    if later and best and _step(best) > step:
        later.append(best)
    return [path.name for path in later]


def _step(path: Path) -> int:
    return checkpoint.step_of(path)


def _of_a_run(folder: Path) -> list[str]:
    """Everything there that a run would write under the same name."""
    names = [path.name for path in folder.iterdir() if re.fullmatch(r"checkpoint_\d+", path.name)]
    return [*names, BEST, *RUN_FILES]


def _check_model(trainer: Run, folder: Path, names: list[str]) -> None:
    """Raises if the model that the run started from, and would start from again when resumed, is about to move."""
    source = trainer.backend.source(trainer.config.model, trainer.config.train)
    if not isinstance(source, (str, Path)) or not Path(source).exists():
        return
    source = Path(source).resolve()
    moving = [path for name in names if (path := (folder / name).resolve()).exists()]
    if any(path == source or path in source.parents for path in moving) or (moving and source == folder.resolve()):
        raise ValueError(
            f"The model that this run starts from, {source}, lies in train.checkpoint_dir among what an earlier run "
            f"left there: set train.checkpoint_dir to another folder than {folder}"
        )


def _let_go() -> None:
    # a lock belongs to every process that has the file open: one that outlives the run must not hold it
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_let_go)
