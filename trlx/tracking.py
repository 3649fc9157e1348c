"""Where metrics and samples go: always into files, and on request to Weights & Biases or TensorBoard."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trlx import logging
from trlx.config import TRLConfig
from trlx.optional import is_available, optional_import

logger = logging.get_logger(__name__)

METRICS = "metrics.jsonl"
ABANDONED = "metrics.abandoned.jsonl"
SAMPLES = "samples"
CONFIG = "config.json"
RUN_FILES = (METRICS, ABANDONED, SAMPLES, CONFIG, "tensorboard")
"""What is written for one run under a name that does not say which."""
EARLIER = "earlier"
"""What the folders are called that such files of an older run move to, with a number."""


class Tracker:
    """Writes metrics and samples of one run; does nothing on other processes than the main one.

    Under `folder`: ``metrics.jsonl`` (one line a call, NaN and infinities as null), ``samples/<kind>_<step>.jsonl`` and
    ``config.json``.

    Args:
        kind: "wandb", "tensorboard", or "none" or None for files only.
        run_name, group, entity, tags: as in Weights & Biases.
        config: the run's settings, plain nested values; never changed.
        state: what `state` returned when the checkpoint was written that the run goes on from. Metrics written after
            that move to ``metrics.abandoned.jsonl``, so that ``metrics.jsonl`` reads like a run without a stop.
            Without one the run is new, and what an older one left in `folder` is set aside.

    Raises:
        ValueError: the kind is unknown.
    """

    def __init__(
        self,
        kind: str | None,
        folder: str | Path,
        *,
        project: str = "trlx",
        run_name: str | None = None,
        group: str | None = None,
        entity: str | None = None,
        tags: list[str] | None = None,
        config: Mapping[str, Any] | None = None,
        is_main: bool = True,
        state: Mapping[str, Any] | None = None,
    ):
        kind = kind or "none"
        if kind not in _REMOTES:
            raise ValueError(f"Unknown tracker {kind!r}. Known: {', '.join(_REMOTES)}")
        self._sinks: list[_Sink] = []
        self.last_state: dict[str, Any] = {}
        """`state` as it was when the tracker was closed."""
        if is_main:
            folder = Path(folder)
            self._sinks.append(_Files(folder, state))
            (folder / CONFIG).write_text(json.dumps(_plain(config or {}), indent=1), encoding="utf-8")
            run = {"project": project, "name": run_name, "group": group, "entity": entity, "tags": list(tags or [])}
            remote = _REMOTES[kind](folder, run, _plain(config or {}), state or {})
            self._sinks += [remote] if remote else []

    @classmethod
    def of(cls, config: TRLConfig, processes: int, is_main: bool, state: Mapping[str, Any] | None) -> Tracker:
        """The tracker that the section ``train`` of a config asks for."""
        train, plain = config.train, config.to_json()
        return cls(
            train.tracker,
            train.logging_dir or train.checkpoint_dir,
            project=train.project_name,
            run_name=train.run_name or default_run_name(plain["model"]["model_path"], processes),
            group=train.group_name,
            entity=train.entity_name,
            tags=train.tags,
            config=plain,
            is_main=is_main,
            state=state,
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Writes numbers (floats, or tensors of one element) under their names."""
        for sink in self._sinks:
            sink.log(metrics, step)

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Shows a table in trackers that have them; files have `log_samples`."""
        for sink in self._sinks:
            sink.log_table(name, columns, _plain(rows), step)

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None:
        """Writes samples, one JSON object a line, into ``samples/<kind>_<step>.jsonl``; kind is "eval" or "rollout"."""
        for sink in self._sinks:
            sink.log_samples(kind, step, rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next Tracker to go on from here; empty but on the main process."""
        return {key: value for sink in self._sinks for key, value in sink.state().items()}

    def close(self) -> None:
        """Finishes every file and remote run; calling it twice is fine."""
        self.last_state = self.state() or self.last_state
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def default_run_name(model_path: Any, num_processes: int) -> str:
    """``script/model/Ngpus:branch``; the branch is left out where there is none.

    `model_path` is a path or hub name, or the dict of a model's configuration.
    """
    script = Path(sys.argv[0]).stem or "python"
    if isinstance(model_path, Mapping):
        model_path = model_path.get("_name_or_path") or model_path.get("model_type") or "model"
    model = Path(model_path).name
    gpus = f"{num_processes}gpu{'s' if num_processes > 1 else ''}"
    branch = _git("branch", "--show-current")
    return f"{script}/{model}/{gpus}" + (f":{branch}" if branch else "")


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Moves what is there of `names` in `folder` to ``earlier.<first free number>`` in it; None if nothing is."""
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        return None
    number = 1
    while (folder / f"{EARLIER}.{number}").exists():
        number += 1
    aside = folder / f"{EARLIER}.{number}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside


class _Sink:
    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None: ...

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


class _Files(_Sink):
    def __init__(self, folder: Path, state: Mapping[str, Any] | None):
        self.metrics, self.samples = folder / METRICS, folder / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        if not state or not _cut_back(folder, state["metrics_bytes"]):
            set_aside(folder, RUN_FILES)
        self.metrics.touch()
        self.samples.mkdir(exist_ok=True)
        self.step = state["step"] if state else -1

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        # opened for each line, so that a killed run has left everything but the one it was writing
        with open(self.metrics, "ab") as file:
            file.write(_line({"step": step, **metrics}).encode())
        self.step = step

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None:
        (self.samples / f"{kind}_{step:08d}.jsonl").write_text("".join(map(_line, rows)), encoding="utf-8")

    def state(self) -> dict[str, Any]:
        return {"metrics_bytes": self.metrics.stat().st_size, "step": self.step}


def _cut_back(folder: Path, size: int) -> bool:
    """Moves what metrics.jsonl holds beyond `size` bytes; False if the file is not the one that had that size."""
    path = folder / METRICS
    written = path.read_bytes() if path.exists() else b""
    if len(written) < size or written[:size].rpartition(b"\n")[2]:
        return False
    if len(written) > size:
        with open(folder / ABANDONED, "ab") as abandoned:
            abandoned.write(written[size:].rstrip(b"\n") + b"\n")
        os.truncate(path, size)
    return True


class _Wandb(_Sink):
    def __init__(self, wandb: Any, **options: Any):
        self.wandb = wandb
        self.run = wandb.init(**options)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        table = self.wandb.Table(columns=columns, rows=rows, allow_mixed_types=True)
        self.run.log({name: table}, step=step)

    def state(self) -> dict[str, Any]:
        return {"wandb_id": self.run.id}

    def close(self) -> None:
        self.run.finish()


def _open_wandb(folder: Path, run: dict[str, Any], config: dict[str, Any], state: Mapping[str, Any]) -> _Sink | None:
    if os.environ.get("debug"):  # noqa: SIM112  the original's name for it
        return None
    wandb = optional_import("wandb", extra="wandb")
    if not wandb:
        logger.warning('wandb is not installed (pip install "trlx[wandb]"): metrics go to %s only', folder)
        return None
    run_id = state.get("wandb_id")
    commit = _git("rev-parse", "--short", "HEAD")
    if commit:  # W&B refuses tags of more than 64 letters
        run["tags"].append(f"{_git('branch', '--show-current')}/{commit}"[-64:])
    mode = _wandb_mode(wandb, folder)
    return _Wandb(
        wandb, **run, dir=str(folder), config=config, id=run_id, resume="allow" if run_id else None, mode=mode
    )


def _wandb_mode(wandb: Any, folder: Path) -> str | None:
    """Where nobody has logged in, "offline" rather than a question on the terminal; None leaves it to WANDB_MODE."""
    if (os.environ.get("WANDB_MODE") or "online") != "online" or wandb.login(prompt=False, verify=False):
        return None
    logger.info("No credentials for Weights & Biases: writing an offline run to %s (`wandb sync` uploads it)", folder)
    return "offline"


class _TensorBoard(_Sink):
    def __init__(self, writer: Any, config: dict[str, Any]):
        self.writer = writer
        # as text: TensorBoard's own hyper-parameters refuse lists and None
        writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in _flat(config).items()))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _open_tensorboard(folder: Path, _: Any, config: dict[str, Any], state: Mapping[str, Any]) -> _Sink | None:
    if not is_available("tensorboard"):
        logger.warning('tensorboard is not installed (pip install "trlx[tensorboard]"): metrics go to %s only', folder)
        return None
    from torch.utils.tensorboard import SummaryWriter

    # hides what an interrupted run logged after the checkpoint
    purge_step = state["step"] + 1 if state else None
    return _TensorBoard(SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step), config)


_REMOTES = {"none": lambda *_: None, "wandb": _open_wandb, "tensorboard": _open_tensorboard}


def _plain(value: Any) -> Any:
    """`value` made of JSON's types: tensors as numbers and lists, NaN and infinities as None, anything else as str."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(_plain(values), ensure_ascii=False, allow_nan=False) + "\n"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _git(*arguments: str) -> str:
    """What git answers about the current folder, or nothing where it has no answer."""
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
