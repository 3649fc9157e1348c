"""The schedule of a run: how long it trains, in which order it reads rows, and its position."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trlx.config import TrainConfig
from trlx.data.store import pass_order


@dataclass
class Schedule:
    """Epochs of passes over the rows of a store, in global batches.

    An epoch trains on one collection of rollouts (online) or on all samples (offline), in `passes_per_epoch` passes.
    Each pass reads the rows in an order of its own, a function of ``train.seed`` and the number of the pass.
    """

    train: TrainConfig
    """``epochs``, ``total_steps``, ``batch_size`` and ``seed``. Later assignments take effect."""
    passes_per_epoch: int
    data_size: int
    """Processes that share a global batch, ``train.batch_size`` rows each."""
    rows_together: int = 1
    """Consecutive rows that stay together, such as the two of a pair."""

    step: int = field(default=0, init=False)
    """Optimizer steps done."""
    epoch: int = field(default=0, init=False)
    """Epochs done."""
    inner_epoch: int = field(default=0, init=False)
    """Passes of the present epoch that are done."""
    passes: int = field(default=0, init=False)
    """Passes done in all."""
    rows_done: int = field(default=0, init=False)
    """Rows of the present pass that are done, over all processes."""

    stopped: str | None = field(default=None, init=False)
    """Why `Trainer.stop` ended training before that."""
    evaluation_due: bool = field(default=False, init=False)
    """Whether to evaluate before the next batch, because the run stopped during an evaluation."""

    @property
    def batch_size(self) -> int:
        """Rows of a global batch."""
        return self.train.batch_size * self.data_size

    @property
    def finished(self) -> bool:
        """Whether training is at its end."""
        return self.why_finished is not None

    @property
    def why_finished(self) -> str | None:
        """The reason why training is at its end; None: it is not."""
        if self.stopped is None and self.epoch >= self.train.epochs:
            return "train.epochs are done"
        if self.stopped is None and self.train.total_steps is not None and self.step >= self.train.total_steps:
            return "train.total_steps are done"
        return self.stopped

    @property
    def begins_epoch(self) -> bool:
        """Whether the next batch is the first of an epoch."""
        return self.inner_epoch == self.rows_done == 0

    def last_step(self, rows_per_epoch: int | None) -> int | None:
        """The step at which training ends; None if neither steps nor rows of an epoch are known."""
        steps = self.train.total_steps
        if rows_per_epoch is None:
            return steps
        of_epochs = self.train.epochs * self.passes_per_epoch * -(-rows_per_epoch // self.batch_size)
        return of_epochs if steps is None else min(steps, of_epochs)

    def rows(self, num_rows: int) -> list[int]:
        """The row numbers of the present global batch, in a store of `num_rows`."""
        order = pass_order(num_rows, self.train.seed, self.passes, self.rows_together)
        return list(order[self.rows_done : self.rows_done + self.batch_size])

    def advance(self, num_rows: int) -> bool:
        """Moves past the present batch. Returns whether it was the last of an epoch."""
        self.step += 1
        self.rows_done += self.batch_size
        return self.settle(num_rows)

    def settle(self, num_rows: int) -> bool:
        """Ends the pass, and the epoch, if all their rows are done. Returns whether the epoch ended."""
        if self.rows_done >= num_rows:
            self.rows_done, self.inner_epoch, self.passes = 0, self.inner_epoch + 1, self.passes + 1
        ended = self.inner_epoch >= self.passes_per_epoch
        if ended:
            self.rows_done, self.inner_epoch, self.epoch = 0, 0, self.epoch + 1
        return ended

    def restart_epoch(self) -> None:
        """Goes back to the beginning of the present epoch, because its rows are gone."""
        self.rows_done = self.inner_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {name: getattr(self, name) for name in _POSITION}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name in _POSITION:
            setattr(self, name, state.get(name, getattr(self, name)))


_POSITION = [f.name for f in fields(Schedule) if not f.init]


def check_blocks(batch_size: int, minibatch_size: int, together: int) -> None:
    """Checks that batches and microbatches hold whole blocks of `together` rows.

    Raises:
        ValueError: they do not.
    """
    for name, rows in (("batch_size", batch_size), ("minibatch_size", minibatch_size)):
        if rows % together:
            raise ValueError(
                f"train.{name} is {rows}, but this trainer keeps {together} rows together: write a multiple of that"
            )
