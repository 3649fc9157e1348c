"""Where metrics and samples go: always into files, and on request to trackers such as Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from trlx.config import TRLConfig
from trlx.tracking.files import (
    ABANDONED,
    ALARMS,
    CONFIG,
    DIGESTS,
    DUMPS,
    EARLIER,
    ENVIRONMENT,
    METRICS,
    PICTURE,
    REPORT,
    RUN_FILES,
    SAMPLES,
    Files,
    logged,
    plain,
    read_lines,
    set_aside,
)
from trlx.tracking.names import default_run_name, git
from trlx.tracking.remotes import check_installed, opened
from trlx.tracking.sink import Run, Sink

__all__ = [
    "ABANDONED",
    "ALARMS",
    "DIGESTS",
    "DUMPS",
    "CONFIG",
    "EARLIER",
    "ENVIRONMENT",
    "METRICS",
    "PICTURE",
    "REPORT",
    "RUN_FILES",
    "SAMPLES",
    "Run",
    "Sink",
    "Tracker",
    "default_run_name",
    "git",
    "check_installed",
    "logged",
    "read_lines",
    "set_aside",
]


class Tracker(AbstractContextManager):
    """Writes metrics and samples of one run; does nothing except on the main process.

    Under `folder`: ``metrics.jsonl`` (one line per call of `log`, NaN and infinities as null),
    ``samples/<kind>_<step>.jsonl`` and ``config.json``.

    Args:
        kinds: the trackers beside the files, as in ``train.tracker``: a name, a list of names, or None.
        config: the run's settings, plain nested values; never changed.
        watchers: classes that are called with `folder` and get all that is logged.
        state: what `state` returned when the checkpoint was written that the run resumes. Metrics written after that
            move to ``metrics.abandoned.jsonl``, so ``metrics.jsonl`` reads like a run that never stopped. Without a
            state the run is new, and what an older run left in `folder` is set aside.
        names: project, name, group, entity and tags, see `Run`.

    Raises:
        ImportError, ValueError, RuntimeError: see `opened`.
    """

    def __init__(
        self,
        kinds: str | list[str] | None,
        folder: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        is_main: bool = True,
        state: Mapping[str, Any] | None = None,
        watchers: Iterable[type[Sink]] = (),
        **names: Any,
    ):
        run = Run(Path(folder), plain(config or {}), state or {}, **names)
        self._sinks: list[Sink] = []
        self.last_state: dict[str, Any] = {}
        """`state` as it was when the tracker was closed."""
        if is_main:
            self._sinks.append(Files(run))
            self._sinks += opened(kinds, run)
            self._sinks += [watcher(run.folder) for watcher in watchers]

    @classmethod
    def of(cls, config: TRLConfig, processes: int, is_main: bool, state: Any, watchers=()) -> Tracker:
        """The tracker that the section ``train`` of a config asks for."""
        train, plain = config.train, config.to_json()
        return cls(
            train.tracker,
            train.logging_dir or train.checkpoint_dir,
            config=plain,
            is_main=is_main,
            state=state,
            watchers=watchers,
            project=train.project_name,
            name=train.run_name or default_run_name(plain["model"]["model_path"], processes),
            group=train.group_name,
            entity=train.entity_name,
            tags=train.tags,
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Writes numbers (floats, or tensors of one element) under their names."""
        for sink in self._sinks:
            sink.log(metrics, step)

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None:
        """Writes samples, one JSON object per line, into ``samples/<kind>_<step>.jsonl``. `kind` is
        "rollout", "histogram" or "eval"; Weights & Biases, Trackio and MLflow get the last."""
        for sink in self._sinks:
            sink.log_samples(kind, step, rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that the next Tracker continues from here; {} on other processes."""
        return {key: value for sink in self._sinks for key, value in sink.state().items()}

    def close(self) -> None:
        """Finishes every file and remote run; calling it twice is fine."""
        self.last_state = self.state() or self.last_state
        while self._sinks:
            self._sinks.pop().close()

    def __exit__(self, *_: Any) -> None:
        self.close()
