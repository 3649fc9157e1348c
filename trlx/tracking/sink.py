"""What a tracker is: it learns about a run when it is opened, and then takes what the run logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """What a tracker learns about its run."""

    folder: Path
    """The run's folder, ``train.logging_dir`` or ``train.checkpoint_dir``."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """All settings, in JSON's types."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What the trackers' `state` returned when the checkpoint was written that the run resumes; {}: the run is new."""
    project: str | None = None
    name: str | None = None
    group: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class Sink:
    """Takes what a run logs. A tracker of your own overrides these; it is built as ``YourTracker(run)``, see `Run`,
    on the main process alone."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Takes numbers (floats, or tensors of one element) under their names."""

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None:
        """Takes samples; `kind` is "rollout" or "eval", or "histogram" for how scores and advantages are spread."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run goes on here. All trackers share the keys."""
        return {}

    def close(self) -> None:
        """Called once, after training."""
