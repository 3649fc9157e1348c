"""What every run writes into its folder: metrics, samples and settings."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trlx.tracking.sink import Run, Sink

METRICS = "metrics.jsonl"
ABANDONED = "metrics.abandoned.jsonl"
SAMPLES = "samples"
CONFIG = "config.json"
ALARMS = "alarms.jsonl"
ENVIRONMENT = "environment.jsonl"
DUMPS, DIGESTS = "dumps", "digests.jsonl"
REPORT, PICTURE = "report.html", "report.png"
_OWN = (METRICS, ABANDONED, SAMPLES, CONFIG, ALARMS, ENVIRONMENT, DUMPS, DIGESTS, REPORT, PICTURE)
RUN_FILES = (*_OWN, "tensorboard", "dvclive")
"""What every run writes under the same name."""
EARLIER = "earlier"
"""Files of an older run move to a folder of this name and a number."""


class Files(Sink):
    """Writes ``metrics.jsonl``, ``samples/<kind>_<step>.jsonl`` and ``config.json``."""

    def __init__(self, run: Run):
        folder, state, self.earlier = run.folder, run.state, run.state
        self.metrics, self.samples, self.step = folder / METRICS, folder / SAMPLES, state.get("step", -1)
        self.samples.parent.mkdir(parents=True, exist_ok=True)
        if not state or not _cut_back(folder, state["metrics_bytes"]):
            set_aside(folder, RUN_FILES)
        self.metrics.touch()
        self.samples.mkdir(exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(run.config, indent=1), encoding="utf-8")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        # opened for each line, so a killed run loses at most the line that it was writing
        with open(self.metrics, "ab") as file:
            file.write(_line({"step": step, **metrics}).encode())
        self.step = step

    def log_samples(self, kind: str, step: int, rows: list[Mapping[str, Any]]) -> None:
        (self.samples / f"{kind}_{step:08d}.jsonl").write_text("".join(map(_line, rows)), encoding="utf-8")

    def state(self) -> dict[str, Any]:
        # with what is known of trackers that this run does without
        return {**self.earlier, "metrics_bytes": self.metrics.stat().st_size, "step": self.step}


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


def logged(folder: str | Path) -> list[dict[str, Any]]:
    """What runs in `folder` logged: the lines of ``metrics.jsonl``, each with its "step". No file: []."""
    return list(read_lines(Path(folder) / METRICS))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of a run. No file: nothing."""
    if path.exists():
        with open(path, encoding="utf-8", newline="\n") as file:
            # another process may be writing the last one
            yield from (json.loads(line) for line in file if line.endswith("\n"))


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


def plain(value: Any) -> Any:
    """`value` made of JSON's types: tensors as numbers and lists, NaN and infinities as None, anything else as str."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(plain(values), ensure_ascii=False, allow_nan=False) + "\n"
