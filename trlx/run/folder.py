"""The folder that a run writes into: which checkpoint it resumes, what it moves away, what it deletes.

Only one run at a time can write into a folder, and it never overwrites the files of an earlier run.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from trlx import checkpoint, logging
from trlx.config import TrainConfig
from trlx.run import Trainer
from trlx.tracking import RUN_FILES, set_aside

logger = logging.get_logger(__name__)

LOCK_FILE = ".lock"
BEST = "best_checkpoint"
PLACE = re.compile(r"checkpoint_\d+")

_held: set[IO] = set()
"""Lock files that this process has open."""
# A lock lives as long as any process has its file open. A child that outlives the run must not keep the lock.
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


@contextmanager
def opened(trainer: Trainer) -> Iterator[bool]:
    """Locks ``train.checkpoint_dir`` while the block runs, and loads the checkpoint to resume from into `trainer`.

    Files of another run in that folder move to its subfolder ``earlier.<number>``. Called on every process.

    Yields:
        Whether the run continues: from a checkpoint, or from an earlier call of ``learn``.

    Raises:
        RuntimeError: another process writes into the folder.
        ValueError: a folder is not writable, ``train.resume_from_checkpoint`` holds no checkpoint, or the run's first
            model is among the files that would move.
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
    """The folder of a step's checkpoint. All steps have as many digits as the last one, so names sort by step."""
    last = train.total_steps if train.total_steps is not None else last_step or 999_999
    return Path(train.checkpoint_dir) / f"checkpoint_{step:0{len(str(last))}d}"


def rotate(written: Path, train: TrainConfig) -> None:
    """Deletes all but the newest ``train.keep_checkpoints`` checkpoints, after the one at `written` is complete.

    Keeps the one that ``train.resume_from_checkpoint`` names, so that the same command can start the run again.
    """
    keep, spared = train.keep_checkpoints, {written.resolve(), Path(train.resume_from_checkpoint or written).resolve()}
    for path in checkpoint.checkpoints(written.parent)[:-keep] if keep else []:
        try:
            if path.resolve() not in spared:
                checkpoint.remove(path)
        except OSError as error:
            logger.warning(f"{path}, which train.keep_checkpoints does not keep, could not be deleted: {error}")


def check_folders(train: TrainConfig) -> None:
    """Checks that a run can write into its folders and that no other run does.

    Raises:
        ValueError: a folder is a file, or not writable.
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
        with locked(folder, fcntl.LOCK_SH):  # all processes of one job check at once, so the lock is a shared one
            pass


def _claim(train: TrainConfig, stack: ExitStack) -> Path | None:
    """Locks the folder until `stack` closes, deletes what killed runs left half done, finds what to resume."""
    check_folders(train)
    folder = Path(train.checkpoint_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(folder))
    checkpoint.tidy(folder)
    return to_resume(train.resume_from_checkpoint, folder)


@contextmanager
def locked(folder: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds the folder's lock while the block runs. The system releases it if this process dies.

    Raises:
        RuntimeError: another process holds it.
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
            logger.warning(f"{folder} cannot be locked ({error}): make sure that no other run writes into it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


def to_resume(wanted: str | None, folder: Path) -> Path | None:
    """The checkpoint that ``train.resume_from_checkpoint`` names for a run in `folder`; None: start afresh.

    Raises:
        ValueError: it names something that is neither a checkpoint nor a folder of checkpoints.
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


def _make_room(folder: Path, trainer: Trainer) -> float | None:
    """Moves away the files of another run, or this run's checkpoints of later steps than the one it resumes.

    Returns the reward of the best checkpoint that stays.
    """
    own = trainer.run_folder == folder.resolve()
    names = _later(folder, trainer.schedule.step) if own else of_a_run(folder)
    _check_model(trainer, folder, names)
    aside = set_aside(folder, names)
    if aside is not None:
        whose = f"Checkpoints of later steps than {trainer.schedule.step}" if own else "What an earlier run left"
        found = checkpoint.newest(aside) or checkpoint.find(aside / BEST)
        hint = f"; to go on from there, set train.resume_from_checkpoint: {found}" if found else ""
        logger.warning(f"{whose} in {folder}: now in {aside}{hint}")
    best = checkpoint.find(folder / BEST)
    return checkpoint.read_state(best, tensors=False)[0]["best"][0] if best else None


def _later(folder: Path, step: int) -> list[str]:
    """The checkpoints of later steps, and the best one if it is of a later step as well."""
    later = [path for path in checkpoint.checkpoints(folder) if checkpoint.step_of(path) > step]
    best = checkpoint.find(folder / BEST)
    # without later checkpoints, this very run wrote it after the checkpoint that it resumes
    if later and best and checkpoint.step_of(best) > step:
        later.append(best)
    return [path.name for path in later]


def of_a_run(folder: Path) -> list[str]:
    """The names in `folder` that a run writes."""
    return [path.name for path in folder.glob("*") if path.name in (BEST, *RUN_FILES) or PLACE.fullmatch(path.name)]


def _check_model(trainer: Trainer, folder: Path, names: list[str]) -> None:
    """Raises ValueError if the model that the run started from would move: a resumed run loads it again."""
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
