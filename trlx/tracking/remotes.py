"""Trackers beside the files of a run: those that Accelerate brings, and those that users register."""

from __future__ import annotations

import json
import logging as standard_logging
import os
import re
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from trlx import logging
from trlx.config import TRACKERS, TrainConfig, flat
from trlx.optional import is_available
from trlx.registry import trackers
from trlx.tracking.files import SAMPLES, plain
from trlx.tracking.names import git
from trlx.tracking.sink import Run, Sink

logger = logging.get_logger(__name__)

EXTRAS = ("wandb", "tensorboard", "mlflow", "trackio")
"""What ``pip install "trlx[...]"`` brings."""
SHORTEST_REST = 60.0
"""A tracker that failed is left alone for so many seconds,"""
SHARE = 0.05
"""and for so long that trying it again takes at most this share of the run's time."""


def check_installed(setting: str | list[str] | None) -> None:
    """Makes sure that the trackers of ``train.tracker`` are installed. The default may be missing.

    Raises:
        ImportError: another one is not installed.
    """
    missing = [name for name in _names(setting) if not _is_installed(name)]
    if missing and setting != TrainConfig.tracker:
        raise ImportError(f"train.tracker: {_not_installed(missing[0])}, or leave it out", name=missing[0])


def opened(setting: str | list[str] | None, run: Run) -> Iterator[Sink]:
    """Opens the trackers of ``train.tracker``.

    Raises:
        RuntimeError: one cannot be opened. If `run` resumes, that is a warning.
        ImportError, ValueError: one is not installed, or unknown.
    """
    check_installed(setting)
    for name in _names(setting):
        if not _is_installed(name):
            logger.warning("%s; metrics go to %s only", _not_installed(name), run.folder)
            continue
        try:
            sink = _kind(name)(run)
        except Exception as error:
            problem = f"train.tracker: {name} cannot be opened ({type(error).__name__}: {error})"
            if not run.state:
                raise RuntimeError(f"{problem}: repair that, or leave it out") from error
            logger.warning("%s: the run goes on without it", problem)
        else:
            yield _Lenient(name, sink)


def _names(setting: str | list[str] | None) -> list[str]:
    names = dict.fromkeys(setting if isinstance(setting, list) else [setting])
    off = (None, "none", *(["wandb"] if os.environ.get("debug") else []))  # noqa: SIM112  the original's name for it
    return [name for name in names if name not in off]


def _is_registered(name: str) -> bool:
    return name in trackers.names() or name not in TRACKERS


def _is_installed(name: str) -> bool:
    return _is_registered(name) or is_available(name)


def _not_installed(name: str) -> str:
    return f"{name} is not installed: pip install " + (f'"trlx[{name}]"' if name in EXTRAS else name)


def _kind(name: str) -> Callable[[Run], Sink]:
    if not _is_registered(name):
        return _KINDS[name]
    own = trackers.get(name)
    return own if issubclass(own, Sink) else partial(Accelerated, kind=own)


class _Lenient(Sink):
    """Hands everything on to a tracker. Errors of the tracker become one warning: the run's files have it all."""

    def __init__(self, name: str, sink: Sink):
        self.name, self.sink, self.known = name, sink, sink.state()
        self.failed, self.rests_until = False, 0.0

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        numbers = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        self._try(lambda: self.sink.log(numbers, step))

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None:
        self._try(lambda: self.sink.log_samples(kind, step, rows))

    def state(self) -> dict[str, Any]:
        self.known = self._try(self.sink.state) or self.known
        return self.known

    def close(self) -> None:
        self.rests_until = 0.0
        self._try(self.sink.close)

    def _try(self, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        if began < self.rests_until:
            return None
        try:
            return work()
        except Exception as error:
            ended = time.monotonic()
            self.rests_until = ended + max((ended - began) / SHARE, SHORTEST_REST)
            if not self.failed:
                self.failed = True
                logger.warning(
                    f"The tracker {self.name} failed ({type(error).__name__}: {error}): the run goes on, its "
                    f"files have what {self.name} misses, and it is tried again"
                )
            return None


class Accelerated(Sink):
    """A subclass of `accelerate.tracking.GeneralTracker`, or the one of this name that Accelerate brings.

    Args:
        title: what the class calls run_name: mostly the project.
        options: its further arguments.
    """

    def __init__(self, run: Run, kind: str | type, title: str | None = None, **options: Any):
        from accelerate import tracking
        from accelerate.logging import MultiProcessAdapter

        class AnyProcess(MultiProcessAdapter):
            log = standard_logging.LoggerAdapter.log
            process = standard_logging.LoggerAdapter.process

        # Accelerate's logger, and its check for the main process, need a state that runs on Megatron-Core do not have
        tracking.logger = AnyProcess(standard_logging.getLogger(tracking.__name__), {})
        kind = tracking.LOGGER_TYPE_TO_CLASS[kind] if isinstance(kind, str) else kind
        if not issubclass(kind, tracking.GeneralTracker):
            raise TypeError(f"{kind.__name__} must subclass trlx.tracking.Sink or accelerate.tracking.GeneralTracker")
        places = [str(run.folder)] if kind.requires_logging_directory else []
        self.run, self.tracker = run, kind(title or run.project, *places, **options)
        self.tracker.main_process_only = False
        self.tracker.start()
        if not run.state:
            self.describe()

    def describe(self) -> None:
        """Stores the settings of a new run."""
        settings = flat(self.run.config).items()
        texts = {key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in settings}
        self.tracker.store_init_configuration(texts)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        self.tracker.finish()


class _Wandb(Accelerated):
    def __init__(self, run: Run):
        import wandb

        mode = None  # WANDB_MODE decides
        if os.environ.get("WANDB_MODE") in (None, "", "online") and not wandb.login(prompt=False, verify=False):
            mode = "offline"  # wandb would ask on the terminal
            logger.info(
                "Not logged in to Weights & Biases: run `wandb sync` to upload the offline run in %s", run.folder
            )
        tags, commit = list(run.tags or []), git("rev-parse", "--short", "HEAD")
        if commit:
            tags.append(f"{git('branch', '--show-current')}/{commit}"[-64:])  # W&B refuses longer tags
        names = {"name": run.name, "group": run.group, "entity": run.entity, "tags": tags, "config": dict(run.config)}
        run_id = run.state.get("wandb_id")
        resumes = {"id": run_id, "resume": "allow" if run_id else None}
        self.table = partial(wandb.Table, allow_mixed_types=True)
        super().__init__(run, "wandb", dir=str(run.folder), mode=mode, **names, **resumes)

    def describe(self) -> None:
        """The run was made with its settings."""

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None:
        if kind == "eval" and rows:
            columns, values = list(rows[0]), plain([list(row.values()) for row in rows])
            self.log({"samples": self.table(columns=columns, data=values)}, step)

    def state(self) -> dict[str, Any]:
        return {"wandb_id": self.tracker.tracker.id}


class _Trackio(Accelerated):
    def __init__(self, run: Run):
        import trackio

        known = run.state.get("trackio_name")
        # trackio finds a run again by its name alone
        names = {"name": known or f"{run.name}-{uuid.uuid4().hex[:6]}", "group": run.group, "config": dict(run.config)}
        self.table = trackio.Table
        super().__init__(run, "trackio", embed=False, resume="must" if known else "never", **names)

    describe, log_samples = _Wandb.describe, _Wandb.log_samples

    def state(self) -> dict[str, Any]:
        return {"trackio_name": self.tracker.tracker.name}


class _TensorBoard(Accelerated):
    def __init__(self, run: Run):
        # purge_step hides what an interrupted run logged after the checkpoint
        super().__init__(run, "tensorboard", "tensorboard", purge_step=run.state["step"] + 1 if run.state else None)

    def describe(self) -> None:
        # as text, because TensorBoard's add_hparams refuses lists and None; four spaces make a code block
        text = textwrap.indent(json.dumps(self.run.config, indent=1), "    ")
        self.tracker.tracker.add_text("config", text)


class _MLflow(Accelerated):
    def __init__(self, run: Run):
        tags = {"group": run.group, "entity": run.entity, "tags": ", ".join(run.tags or [])}
        told = {name: text for name, text in tags.items() if text}
        super().__init__(run, "mlflow", run_name=run.name, run_id=run.state.get("mlflow_id"), tags=told)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        # the characters that MLflow allows
        super().log({re.sub(r"[^\w\-. :/]", "_", name): value for name, value in metrics.items()}, step)

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None:
        import mlflow

        if kind == "eval":
            mlflow.log_artifact(str(self.run.folder / SAMPLES / f"{kind}_{step:08d}.jsonl"), SAMPLES)

    def state(self) -> dict[str, Any]:
        return {"mlflow_id": self.tracker.tracker.info.run_id}


def _swanlab(run: Run) -> Sink:
    os.environ.setdefault("SWANLAB_INTERACTIVE", "false")  # it would ask on the terminal
    names = {"name": run.name, "workspace": run.entity, "group": run.group, "tags": run.tags}
    return Accelerated(run, "swanlab", log_dir=str(run.folder / "swanlog"), **names)


_KINDS: dict[str, Callable[[Run], Sink]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "trackio": _Trackio,
    "comet_ml": lambda run: Accelerated(run, "comet_ml", workspace=run.entity),
    "aim": lambda run: Accelerated(run, "aim", run.name, experiment=run.project),
    "clearml": lambda run: Accelerated(run, "clearml", task_name=run.name, tags=run.tags, reuse_last_task_id=False),
    "dvclive": lambda run: Accelerated(run, "dvclive", dir=str(run.folder / "dvclive"), resume=bool(run.state)),
    "swanlab": _swanlab,
}
