"""How a trainer's checkpoints are written: at once, or from copies in host memory while training goes on."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from trlx import checkpoint
from trlx.background import Background
from trlx.checkpoint import RandomState
from trlx.run import Trainer
from trlx.run import folder as run_folder
from trlx.run.changes import identity
from trlx.run.guards import check_weights


class Saver:
    """Writes the checkpoints of one trainer, one at a time.

    Raises:
        ValueError: ``train.async_save`` asks for what the backend cannot do.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        backend, asked = trainer.backend, trainer.config.train.async_save
        if asked and not backend.can_copy_weights:
            raise ValueError(
                "train.async_save needs a process that holds all weights; under FSDP, DeepSpeed and NeMo trainers "
                "checkpoints are written at once: leave it out"
            )
        wanted = backend.device.type != "cpu" if asked is None else asked
        self._background = Background() if wanted and backend.can_copy_weights else None
        self._begun: tuple[Path, int] | None = None
        """The checkpoint that is being written, if the run can resume from it, and its step."""

    def begin(self, directory: str | Path | None = None, like: Path | None = None) -> None:
        """Starts to write a checkpoint, see `Trainer.save`. With ``train.async_save`` training may go on at once.

        Args:
            like: a checkpoint of the present state, whose files the new one shares.
        """
        trainer, backend, train = self.trainer, self.trainer.backend, self.trainer.config.train
        if directory is None and trainer.probe is not None:
            check_weights(backend, trainer.probe)
        own = run_folder.place(train, trainer.schedule.step, trainer.total_steps)
        target = Path(directory or own).expanduser()
        if like is None:
            self.finish()
        backend.on_main(partial(checkpoint.check_replaceable, target))
        if like is None:
            self._write(target)
        else:
            self._then(partial(checkpoint.link, like, target))
        if directory is None:
            self._begun = own, trainer.schedule.step
            self._then(partial(run_folder.rotate, own, train))
        if self._background is None:
            self.finish()

    @property
    def best(self) -> Path:
        """The folder of the best checkpoint."""
        return Path(self.trainer.config.train.checkpoint_dir) / run_folder.BEST

    def keep_best(self, name: str, objective: float | None) -> None:
        """Writes the best checkpoint if `objective`, a number called `name`, is higher than that of the last one."""
        trainer = self.trainer
        highest, trainer.best_metric = trainer.best_reward, name or trainer.best_metric
        if objective is None or not math.isfinite(objective) or (highest is not None and objective <= highest):
            return
        trainer.best_reward, trainer.best_step = objective, trainer.schedule.step
        if trainer.config.train.save_best:
            trainer.begin_to_save(self.best)

    def finish(self) -> None:
        """Waits until what was begun is on the disk. Called on every process.

        Raises:
            OSError: it could not be written; on other processes than the main one `ErrorElsewhere`.
        """
        begun, self._begun = self._begun, None
        if self._background is not None:
            self.trainer.backend.on_main(self._background.wait)
        self.trainer.saved = begun or self.trainer.saved

    def wait(self) -> None:
        """`finish` for a process that leaves without the others."""
        if self._background is not None:
            self._background.wait()
            self.trainer.saved, self._begun = self._begun or self.trainer.saved, None

    def export(self, folder: Path, merge: bool) -> None:
        """See `Trainer.save_pretrained`."""
        backend = self.trainer.backend
        backend.on_main(partial(checkpoint.make_folder, folder))
        backend.export_hf(folder, merge)
        backend.barrier()

    def _write(self, target: Path) -> None:
        trainer, backend = self.trainer, self.trainer.backend
        with checkpoint.replacing(target, backend.is_main, backend.barrier, self._background) as folder:
            backend.save(folder, optimizer=trainer.config.train.save_optimizer)
            RandomState.capture().write(folder, f"{backend.data_rank:05d}{backend.shard}")
            if backend.is_main:
                run = identity(trainer.config, backend, trainer.data_digest)
                checkpoint.write_state(folder, trainer.state_dict(), run)
            trainer.save_pretrained(folder / "hf_model")

    def _then(self, work) -> None:
        """Does `work` on the main process, after the checkpoint that is being written."""
        if self._background is None:
            self.trainer.backend.on_main(work)
        elif self.trainer.backend.is_main:
            self._background.start(work)
