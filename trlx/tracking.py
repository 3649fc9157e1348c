"""Where metrics and samples go: always into files, and on request to Weights & Biases or TensorBoard."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from trlx import logging
from trlx.config import TRLConfig
from trlx.optional import is_available

logger = logging.get_logger(__name__)

METRICS = "metrics.jsonl"
ABANDONED = "metrics.abandoned.jsonl"
SAMPLES = "samples"
CONFIG = "config.json"
ALARMS = "alarms.jsonl"
ENVIRONMENT = "environment.jsonl"
REPORT, PICTURE = "report.html", "report.png"
RUN_FILES = (METRICS, ABANDONED, SAMPLES, CONFIG, ALARMS, ENVIRONMENT, REPORT, PICTURE, "tensorboard")
"""What every run writes under the same name."""
EARLIER = "earlier"
"""Files of an older run move to a folder of this name and a number."""


class Tracker(AbstractContextManager):
    """Writes metrics and samples of one run; does nothing except on the main process.

    Under `folder`: ``metrics.jsonl`` (one line per call of `log`, NaN and infinities as null),
    ``samples/<kind>_<step>.jsonl`` and ``config.json``.

    Args:
        kind: "wandb", "tensorboard", or "none" or None for files only.
        config: the run's settings, plain nested values; never changed.
        watchers: classes that are called with `folder` and get all that is logged.
        state: what `state` returned when the checkpoint was written that the run resumes. Metrics written after that
            move to ``metrics.abandoned.jsonl``, so ``metrics.jsonl`` reads like a run that never stopped. Without a
            state the run is new, and what an older run left in `folder` is set aside.
        run: arguments of ``wandb.init``: project, name, group, entity, tags.

    Raises:
        ValueError: the kind is unknown.
    """

    def __init__(
        self,
        kind: str | None,
        folder: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        is_main: bool = True,
        state: Mapping[str, Any] | None = None,
        watchers: Iterable[type[Sink]] = (),
        **run: Any,
    ):
        kind = kind or "none"
        if kind not in _REMOTES:
            raise ValueError(f"Unknown tracker {kind!r}. Known: {', '.join(_REMOTES)}")
        self._sinks: list[Sink] = []
        self.last_state: dict[str, Any] = {}
        """`state` as it was when the tracker was closed."""
        if is_main:
            self._open(kind, Path(folder), _plain(config or {}), state or {}, run)
            self._sinks += [watcher(Path(folder)) for watcher in watchers]

    def _open(self, kind: str, folder: Path, config: dict[str, Any], state: Mapping[str, Any], run: dict[str, Any]):
        self._sinks.append(_Files(folder, config, state))
        if kind == "none" or (kind == "wandb" and os.environ.get("debug")):  # noqa: SIM112  the original's name for it
            return
        if is_available(kind):
            self._sinks.append(_REMOTES[kind](folder, config, state, run))
        else:
            logger.warning('%s is not installed (pip install "trlx[%s]"): metrics go to %s only', kind, kind, folder)

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
        """Writes samples, one JSON object per line, into ``samples/<kind>_<step>.jsonl``. `kind` is "rollout" or
        "eval"; Weights & Biases gets a table of the latter."""
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


def logged(folder: str | Path) -> list[dict[str, Any]]:
    """What runs in `folder` logged: the lines of ``metrics.jsonl``, each with its "step". No file: []."""
    return list(read_lines(Path(folder) / METRICS))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of a run. No file: nothing."""
    if path.exists():
        with open(path, encoding="utf-8", newline="\n") as file:
            # another process may be writing the last one
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def default_run_name(model_path: Any, num_processes: int) -> str:
    """``script/model/Ngpus:branch``; the branch is left out where there is none.

    `model_path` is a path or hub name, or the dict of a model's configuration.
    """
    if isinstance(model_path, Mapping):
        model_path = model_path.get("_name_or_path") or model_path.get("model_type") or "model"
    gpus = f"{num_processes}gpu{'s' if num_processes > 1 else ''}"
    branch = git("branch", "--show-current")
    return f"{Path(sys.argv[0]).stem or 'python'}/{Path(model_path).name}/{gpus}" + (f":{branch}" if branch else "")


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Moves those of `names` that exist in `folder` to a new ``folder/earlier.<number>``; None if none exists."""
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        return None
    numbered = (folder / f"{EARLIER}.{number}" for number in itertools.count(1))
    aside = next(path for path in numbered if not path.exists())
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside


class Sink:
    """Takes what a run logs, see `Tracker`."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


class _Files(Sink):
    def __init__(self, folder: Path, config: dict[str, Any], state: Mapping[str, Any]):
        self.metrics, self.samples, self.step = folder / METRICS, folder / SAMPLES, state.get("step", -1)
        self.samples.parent.mkdir(parents=True, exist_ok=True)
        if not state or not _cut_back(folder, state["metrics_bytes"]):
            set_aside(folder, RUN_FILES)
        self.metrics.touch()
        self.samples.mkdir(exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        # opened for each line, so a killed run loses at most the line that it was writing
        with open(self.metrics, "ab") as file:
            file.write(_line({"step": step, **metrics}).encode())
        self.step = step

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None:
        (self.samples / f"{kind}_{step:08d}.jsonl").write_text("".join(map(_line, rows)), encoding="utf-8")

    def state(self) -> dict[str, Any]:
        return {"metrics_bytes": self.metrics.stat().st_size, "step": self.step}


def _cut_back(folder: Path, size: int) -> bool:
    """Moves what metrics.jsonl holds beyond `size` bytes; False if no line ends there, so the file is another run's."""
    path = folder / METRICS
    written = path.read_bytes() if path.exists() else b""
    if len(written) < size or written[:size].rpartition(b"\n")[2]:
        return False
    if len(written) > size:
        with open(folder / ABANDONED, "ab") as abandoned:
            abandoned.write(written[size:].rstrip(b"\n") + b"\n")
        os.truncate(path, size)
    return True


class _Wandb(Sink):
    def __init__(self, folder: Path, config: dict[str, Any], state: Mapping[str, Any], run: dict[str, Any]):
        import wandb

        mode = None  # WANDB_MODE decides
        if os.environ.get("WANDB_MODE") in (None, "", "online") and not wandb.login(prompt=False, verify=False):
            mode = "offline"  # wandb would ask on the terminal
            logger.info("Not logged in to Weights & Biases: run `wandb sync` to upload the offline run in %s", folder)
        tags, commit = list(run.pop("tags", [])), git("rev-parse", "--short", "HEAD")
        if commit:
            tags.append(f"{git('branch', '--show-current')}/{commit}"[-64:])  # W&B refuses longer tags
        run |= {"tags": tags, "dir": str(folder), "config": config, "mode": mode}
        run_id = state.get("wandb_id")
        self.table, self.run = wandb.Table, wandb.init(**run, id=run_id, resume="allow" if run_id else None)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None:
        if kind == "eval":
            columns, values = list(rows[0]), _plain([list(row.values()) for row in rows])
            self.run.log({"samples": self.table(columns=columns, rows=values, allow_mixed_types=True)}, step=step)

    def state(self) -> dict[str, Any]:
        return {"wandb_id": self.run.id}

    def close(self) -> None:
        self.run.finish()


class _TensorBoard(Sink):
    def __init__(self, folder: Path, config: dict[str, Any], state: Mapping[str, Any], run: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run logged after the checkpoint
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=state["step"] + 1 if state else None)
        # as text, because TensorBoard's add_hparams refuses lists and None; four spaces make a code block
        self.writer.add_text("config", textwrap.indent(json.dumps(config, indent=1), "    "))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


_REMOTES = {"none": None, "wandb": _Wandb, "tensorboard": _TensorBoard}


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


def git(*arguments: str) -> str:
    """What git prints about the current folder; "" where git fails or is not installed."""
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
