"""What may end a run early: a signal that asks it to save and leave, or gradients that stay broken."""

from __future__ import annotations

import signal
import threading

from trlx import logging
from trlx.checkpoint import TrainerState

logger = logging.get_logger(__name__)

EXIT_REQUEUE = 75
"""Exit code after a save on request (EX_TEMPFAIL of sysexits.h): start again to go on."""


MOST_SKIPPED_IN_A_ROW = 25
"""Steps with non-finite gradients after which a run gives up; fp16 needs a few to find its loss scale."""


class Interrupts:
    """While the block runs, SIGTERM and SIGUSR1 only set ``received``; afterwards the old handlers are back.

    SLURM sends them before it takes a machine away.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        # Python lets only the main thread handle signals; in any other the run simply cannot be asked to save
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name


class SkippedSteps:
    """Counts the steps that changed nothing because gradients were not finite, and ends a run that makes no others."""

    def __init__(self):
        self.in_a_row = 0

    def count(self, metrics: dict[str, float], state: TrainerState) -> None:
        """Takes one step's ``skipped_steps`` (0 or 1) and puts the run's total in its place.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        skipped = bool(metrics["skipped_steps"])
        state.skipped_steps += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        metrics["skipped_steps"] = float(state.skipped_steps)
        if skipped:
            logger.warning(f"Step {state.step}: gradients are not finite, nothing was updated")
        if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"Gradients were not finite in {MOST_SKIPPED_IN_A_ROW} steps in a row. Lower optimizer.kwargs.lr, set "
                "train.max_grad_norm, or use bf16 instead of fp16; the last checkpoint is from before"
            )
