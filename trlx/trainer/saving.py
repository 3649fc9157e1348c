"""What of a run goes into a checkpoint, and how a run takes it up again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlx import checkpoint, logging
from trlx.backends.base import Backend
from trlx.backends.distress import shared
from trlx.batch import TokenBatch
from trlx.checkpoint import RandomState
from trlx.run.changes import changes, keeps_averages
from trlx.sampling.settings import DIVERGED
from trlx.trainer.together import on_main

if TYPE_CHECKING:
    from trlx.trainer.base import Trainer

logger = logging.get_logger(__name__)


def make_folder(folder: Path) -> None:
    """Makes a folder that something is saved into, if it is not there.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made a folder to save into ({error.strerror}): name another") from None


def write_run(trainer: Trainer, target: Path) -> None:
    """Puts everything `read_run` needs into a folder that takes the place of `target`. Called on every process.

    Raises:
        ValueError: `target` holds other things than one checkpoint.
    """
    backend = trainer.backend
    on_main(backend, lambda: checkpoint.check_replaceable(target))
    with checkpoint.replacing(target, backend.is_main, backend.barrier) as folder:
        backend.save(folder, optimizer=trainer.config.train.save_optimizer)
        RandomState.capture().write(folder, f"{backend.data_rank:05d}{backend.part}")
        if backend.is_main:
            checkpoint.write_state(folder, trainer.state, identity(trainer))
            trainer.write_rollouts(folder)
        trainer.save_pretrained(folder / "hf_model")


def check_weights(backend: Backend, batch: TokenBatch) -> None:
    """Keeps a model that has diverged from taking the place of a checkpoint that can be used. Called on every process.

    Raises:
        FloatingPointError: log-probabilities of `batch` are not finite.
    """
    if backend.any_process(not backend.evaluate(batch).logprobs.isfinite().all()):
        raise shared(FloatingPointError(DIVERGED))


def read_run(trainer: Trainer, directory: Path) -> None:
    """Makes `trainer` the run that wrote the checkpoint, or says of each difference what becomes of it.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is of another method or backend, or holds other weights than this config trains.
    """
    folder = checkpoint.existing(directory)
    state, saved = checkpoint.read_state(folder)
    now = identity(trainer)
    for change in changes(saved, now):
        logger.warning(f"Resuming {folder} where something has changed. {change}")
    trainer.state = state
    trainer.backend.load(folder, optimizer=keeps_averages(saved, now))
    trainer.load_method_state(state.method)
    trainer.read_rollouts(folder)
    if trainer.store is not None:
        trainer.settle()
    elif trainer.online or saved["data"] != now["data"]:
        state.rows_done = state.inner_epoch = 0
    own = f"{trainer.backend.data_rank:05d}"
    # in another layout there may be no such part; then what the leading process drew goes on here
    randomness = RandomState.read(folder, own + trainer.backend.part) or RandomState.read(folder, own)
    if randomness is not None:
        randomness.restore()


def identity(trainer: Trainer) -> dict[str, Any]:
    """What must be the same for a resumed run to give the same numbers."""
    return {
        "backend": type(trainer.backend).__name__,
        "config": trainer.config.to_json(),
        "model": trainer.backend.fingerprint(),
        "schedule": trainer.backend.schedule,
        "data": trainer.data_digest,
        "data_processes": trainer.backend.data_size,
    }
