"""Callbacks see what a run measures, and may end it."""

from __future__ import annotations

from typing import Any

from trlx import logging
from trlx.run import Trainer
from trlx.strict import suggestion

logger = logging.get_logger(__name__)


class Callback:
    """Sees what a run measures: override what you need, and pass an instance in ``trlx.train(callbacks=[...])``.

    Each process of a job calls each method, with the same numbers but for those of a clock; what prints or writes asks
    for ``trainer.backend.is_main``. ``trainer.stop("why")`` ends the run. An error ends it too, after a checkpoint.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first evaluation, and where a run goes on."""

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After an optimizer step. Numbers that are added to `metrics` are logged too."""

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After an evaluation. Numbers that are added to `metrics` are logged too."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last checkpoint of a run that came to its end."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: nested dicts of plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""


class EarlyStopping(Callback):
    """Ends a run whose last `patience` evaluations were no better than one before them.

    Args:
        metric: a number of the evaluations, such as "reward/mean", "eval/loss" or "eval/accuracy".
        patience: how many evaluations in a row may be no better.
        min_delta: by how much a better one differs.
        mode: "max" if more is better, "min" if less is.

    Raises:
        ValueError: an argument is out of range; or, at the first evaluation, it has no such metric.
    """

    def __init__(self, metric: str = "reward/mean", patience: int = 3, min_delta: float = 0.0, mode: str = "max"):
        if patience < 1 or min_delta < 0 or mode not in ("max", "min"):
            raise ValueError(
                f"EarlyStopping needs patience >= 1, min_delta >= 0 and mode 'max' or 'min', "
                f"got {patience}, {min_delta} and {mode!r}"
            )
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self.sign = 1 if mode == "max" else -1
        self.best: float | None = None
        self.waited = 0

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            advice = suggestion(self.metric, metrics) or f" They have {', '.join(sorted(metrics))}."
            raise ValueError(f"EarlyStopping watches {self.metric!r}, but evaluations have no such number.{advice}")
        value = self.sign * metrics[self.metric]
        is_better = self.best is None or value > self.best + self.min_delta
        self.best, self.waited = (value, 0) if is_better else (self.best, self.waited + 1)
        if self.waited >= self.patience:
            trainer.stop(f"{self.metric} was no better than {self.sign * self.best:.4g} in {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


def check_callbacks(callbacks: list[Callback]) -> None:
    """Checks that all are callbacks.

    Raises:
        TypeError: one of them is not.
    """
    for each in callbacks:
        if not isinstance(each, Callback):
            hint = "; write it with () to make one" if isinstance(each, type) else ""
            raise TypeError(f"callbacks takes a list of trlx.Callback, and {each!r} is none{hint}")


class Callbacks(list[Callback]):
    """The callbacks of a trainer, the same on every process. They are added before `Trainer.learn`."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer = trainer

    def tell(self, event: str, *arguments: Any) -> None:
        """Calls the method `event` of each callback. A stop on one process is a stop on all."""
        if not self:
            return
        for each in self:
            getattr(each, event)(self.trainer, *arguments)
        schedule = self.trainer.schedule
        if self.trainer.backend.any_process(schedule.stopped is not None):
            schedule.stopped = schedule.stopped or "a callback on another process ended the run"

    def state(self) -> list[list[Any]]:
        """What a resume needs of each: its class's name and its state."""
        return [[type(each).__name__, each.state_dict()] for each in self]

    def load(self, state: list[list[Any]]) -> None:
        """Restores what `state` returned. A run that a callback ended goes on if it is resumed without callbacks."""
        if not self:
            self.trainer.schedule.stopped = None
        elif [name for name, _ in state] == [type(each).__name__ for each in self]:
            for each, (_, own) in zip(self, state, strict=True):
                each.load_state_dict(own)
        else:
            logger.warning("The callbacks are not those that the checkpoint was written with: they start anew")
