"""What surrounds training: the folder a run writes to, what it shows, how it stops, and how it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from trlx.backends.base import Backend
    from trlx.config import TRLConfig
    from trlx.tracking import Tracker


class Position(Protocol):
    """Where a run stands."""

    step: int
    """Optimizer steps done."""


class Skipped(Protocol):
    """Steps with gradients that were not finite."""

    in_a_row: int


class Run(Protocol):
    """What these files know of a trainer."""

    config: TRLConfig
    backend: Backend
    schedule: Position
    total_steps: int | None
    tracker: Tracker | None
    tracker_state: dict[str, Any]
    best_reward: float | None
    best_step: int | None
    saved: tuple[Path, int] | None
    """The last checkpoint to resume from, and its step."""
    at_boundary: bool
    """Whether it is between steps, where what is saved can be resumed from."""
    run_folder: Path | None
    """The folder of the run that it goes on; None: it starts one."""

    skipped: Skipped
    """The steps that changed nothing."""

    def save(self, directory: str | Path | None = None) -> None:
        """Writes a checkpoint."""

    def load(self, directory: str | Path | None = None) -> None:
        """Restores a checkpoint."""
