"""What watches the steps of a run and may end it: the guards, and checks that policy and reference are one at first."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from trlx import logging
from trlx.backends import distress
from trlx.backends.base import Backend, LossFn
from trlx.batch import TokenBatch
from trlx.guard_rules import RULES, guards_of, judge, remember
from trlx.run import Trainer, steps
from trlx.sampling.settings import DIVERGED
from trlx.tracking import DUMPS

logger = logging.get_logger(__name__)

FIRST_RATIO_TOLERANCE = 1e-3
"""How far the first ratio may be from 1 without a warning; float32 stays within 1e-5."""
REAL_DIFFERENCE = 1e-3
"""Nats per token; rounding errors in float32 are smaller."""
MOST_SKIPPED_IN_A_ROW = 25
"""Steps with non-finite gradients after which a run gives up; fp16 needs a few to find its loss scale."""
MOST_LEFT_OUT_IN_A_ROW = 5
"""Steps or collections that a guard leaves out before it ends the run: it would leave out the next ones, too."""
MOST_DUMPS = 3
"""Batches that are written for each guard."""


class Guards:
    """Takes the optimizer steps of a trainer and watches them, as ``train.guards`` says: see docs/guards.md.

    Every process judges the same numbers. Where a guard may leave out a step, the main process decides for all.

    Raises:
        ValueError: ``train.guards`` asks for what the backend cannot do.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, train = trainer, trainer.config.train
        self.guards = guards_of(train.guards)
        skips = [name for name, guard in self.guards.items() if guard.action == "skip" and name != "non_finite"]
        if skips and not trainer.backend.can_leave_out:
            raise ValueError(
                f"train.guards.{skips[0]}: skip does not work under DeepSpeed, which cannot drop gradients: write warn "
                "or stop"
            )
        self.acting = {*skips, *(name for name, guard in self.guards.items() if guard.action == "stop")}
        """Guards that may leave out a step that the backend would take, or end the run."""
        self.folder = Path(train.logging_dir or train.checkpoint_dir)
        self.memory: dict[str, Any] = {}
        """What a resume needs."""
        self.in_a_row = 0
        """Steps up to now whose gradients were not finite."""
        self.step, self.store, self.rows = 0, None, []
        """The step that is being taken: its number, what the epoch trains on, and which rows of it."""

    def train_step(self, batch: TokenBatch, loss: LossFn) -> dict[str, float]:
        """`Backend.train_step`, whose update a guard may leave out."""
        trainer, backend, step = self.trainer, self.trainer.backend, self.trainer.schedule.step + 1
        self.step, self.store, self.rows = step, trainer.store, trainer.schedule.rows(len(trainer.store))
        if trainer.pending:  # what a new collection measured
            self.memory["left_out"] = self._acting(trainer.pending, slice(None), "the steps on this collection")
        is_recorded = backend.is_main and steps.is_recorded(trainer.config.train, step)
        recording = steps.recorded(backend, self.folder, step, batch, loss) if is_recorded else nullcontext(loss)
        # only for this step: a backend that outlives its trainer would hold it through this
        backend.before_update, decide = self._may_update, backend.before_update
        try:
            with recording as loss:
                return backend.train_step(batch, loss, trainer.unit, trainer.rows_together)
        finally:
            backend.before_update = decide

    def count(self, metrics: dict[str, float]) -> None:
        """Counts a step by its ``skipped_steps`` (0 or 1), which it replaces by the run's total.

        Raises:
            FloatingPointError: gradients were not finite in `MOST_SKIPPED_IN_A_ROW` steps in a row.
        """
        skipped = bool(metrics["skipped_steps"])
        self.memory["skipped_steps"] = self.memory.get("skipped_steps", 0) + skipped
        metrics["skipped_steps"] = float(self.memory["skipped_steps"])
        measured = {name: metrics[name] for name in metrics if name == "grad_norm"}
        # a step that a guard left out has no norm
        self.in_a_row = self.in_a_row + 1 if skipped and measured else 0
        self._acting(measured, self.rows, "")
        if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"Gradients were not finite in {MOST_SKIPPED_IN_A_ROW} steps in a row. Lower optimizer.kwargs.lr, set "
                "train.max_grad_norm, or use bf16 instead of fp16"
            )

    def _may_update(self, means: dict[str, float]) -> bool:
        acting = self._acting(means, self.rows, "this step")
        # a run that was stopped and resumed may have other guards than when the collection began
        return not (acting or self.acting.intersection(self.memory.get("left_out", [])))

    def _acting(self, measured: dict[str, float], rows: Any, what: str) -> list[str]:
        """Judges what was measured on `rows`. Returns the guards that leave out `what`."""
        found, counts = judge(self.guards, measured, self.memory), self.memory.setdefault("in_a_row", {})
        fired = [name for name, (_, fires) in found.items() if fires]
        remember(self.memory, measured, fired)
        for name in fired:
            if not counts.get(name):
                self._tell(name, found[name][0], measured, rows, what)
        counts.update({name: counts.get(name, 0) + 1 if name in fired else 0 for name in found})
        if not self.acting.intersection(found):
            return []
        acting = sorted(self.acting.intersection(fired))
        ends = [name for name in acting if self.guards[name].action == "stop" or counts[name] >= MOST_LEFT_OUT_IN_A_ROW]
        acting, ends = self.trainer.backend.broadcast_object((acting, ends))
        if ends:
            self.trainer.stop(f"train.guards.{ends[0]} ended it at step {self.step}")
            logger.warning(f"Step {self.step}: {self.trainer.schedule.stopped}")
        return acting

    def _tell(self, name: str, number: float, measured: dict[str, float], rows: Any, what: str) -> None:
        """One line about a guard that begins to fire, and the batch that it fired on."""
        rule, guard = RULES[name], self.guards[name]
        found = rule.found.format(number) + (f", {rule.side} {guard.limit:g}" if rule.side else "")
        done = {"skip": f": {what} will change nothing", "stop": ": the run ends"}.get(guard.action, "")
        if name == "non_finite":
            done = ", nothing was updated; no checkpoint is written until a step updates something"
        message, dumps = f"Step {self.step}: {found}{done}. {rule.advice}", self.folder / DUMPS
        if self.trainer.backend.is_main and len(list(dumps.glob(f"step_*_{name}"))) < MOST_DUMPS:
            target = dumps / f"step_{self.step}_{name}"
            about = {"guard": name, "step": self.step, "message": message, "metrics": measured}
            try:
                steps.dump(target, self.store.rows(rows), self.trainer.tokenizer.decode, about)
                message += f". Its batch is in {target}"
            except OSError as error:
                message += f". Its batch could not be written: {error}"
        logger.warning(message)


def check_first_kl(per_token: float, precision: torch.dtype) -> None:
    """Before the first update policy and reference are equal, so their KL is 0 up to rounding.

    The sums in some kernels depend on the shape of the batch, so two passes give a token two log-probabilities. If
    these differ by d, k3 is d² / 2. Rounding explains d = 16 eps of `precision` (logits are about 16 to 32), and
    d = 128 eps of float32 (sums have thousands of terms). A larger KL gets a warning. A KL more than 4 times as large,
    and above `REAL_DIFFERENCE`, ends the run.

    Args:
        per_token: mean KL over response tokens (k3; nats).
        precision: the dtype in which log-probabilities are computed.

    Raises:
        RuntimeError: policy and reference differ.
    """
    rounding = max(16 * torch.finfo(precision).eps, 128 * torch.finfo(torch.float32).eps) ** 2 / 2
    if per_token <= rounding:
        return
    found = f"Before the first update the KL between policy and reference is {per_token:.3g} nats per token"
    if per_token <= max(4 * rounding, REAL_DIFFERENCE):
        logger.warning(
            f"{found}, where rounding ({str(precision).removeprefix('torch.')}) explains {rounding:.1g} at most: the "
            "KL penalty has noise of this size"
        )
        return
    raise RuntimeError(
        f"{found} instead of 0: this model gives two outputs for one input (random routing, or a buffer that changes "
        "in forward), so PPO would train on noise"
    )


def check_first_ratio(deviation: float) -> None:
    """Warns if the probability ratio of the first minibatch, which should be 1, is further away than rounding explains.

    Args:
        deviation: the largest |ratio - 1|.
    """
    if deviation > FIRST_RATIO_TOLERANCE:
        logger.warning(
            f"On the first minibatch the probability ratio is up to {deviation:.3g} away from 1: training computes "
            "other log-probabilities than sampling did (low precision, or a module that differs in train mode)"
        )


def check_weights(backend: Backend, batch: TokenBatch) -> None:
    """Refuses to save a model that has diverged. Called on every process.

    Raises:
        FloatingPointError: log-probabilities, or scores, of `batch` are not finite.
    """
    outputs = backend.evaluate(batch)
    said = outputs.logprobs if outputs.last is None else outputs.last
    if backend.any_process(not said.isfinite().all()):
        raise distress.shared(FloatingPointError(DIVERGED))
