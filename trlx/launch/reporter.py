"""While a run goes on: its alarms and its environment as files, and its report page, written again and again."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from trlx import __version__
from trlx.launch.report import write_page
from trlx.logging import get_logger
from trlx.tracking import ALARMS, ENVIRONMENT, Sink, git

logger = get_logger(__name__)

SHARE = 0.01
"""The page takes at most this share of a run's time."""
SECONDS_BETWEEN_PAGES = 10.0
"""And it is written no more often than this."""
PACKAGES = "torch transformers accelerate tokenizers numpy peft datasets megatron-core deepspeed bitsandbytes vllm"


class Reporter(Sink):
    """Writes ``environment.jsonl`` (one line per start), ``alarms.jsonl`` and ``report.html`` into a run's folder.

    Nothing that it does can end the run: after the first error it gives up with a warning.
    """

    def __init__(self, folder: Path):
        self.folder, self.step, self.failed = folder, 0, False
        self.next = time.monotonic() + SECONDS_BETWEEN_PAGES
        self.alarms = _Alarms(self)
        logging.getLogger("trlx").addHandler(self.alarms)
        self._try(lambda: self._append(ENVIRONMENT, {"started": _now(), **environment()}))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.step = step
        if time.monotonic() >= self.next:
            self._try(self._write)

    def close(self) -> None:
        logging.getLogger("trlx").removeHandler(self.alarms)
        self._try(self._write)

    def alarm(self, record: logging.LogRecord) -> None:
        """Writes a warning or an error down."""
        self._try(lambda: self._append(ALARMS, {"step": self.step, "time": _now(), "message": record.getMessage()}))

    def _write(self) -> None:
        began = time.monotonic()
        write_page([self.folder])
        ended = time.monotonic()
        self.next = ended + max((ended - began) / SHARE, SECONDS_BETWEEN_PAGES)

    def _append(self, name: str, values: dict[str, Any]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def _try(self, work: Callable[[], Any]) -> None:
        if self.failed:
            return
        try:
            work()
        except Exception as error:
            self.failed = True  # before the warning, which comes back as an alarm
            logger.warning(f"The run goes on without its report page: {type(error).__name__}: {error}")


class _Alarms(logging.Handler):
    """Hands the warnings and errors that this process logs to a Reporter."""

    def __init__(self, reporter: Reporter):
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.alarm(record)


@functools.cache
def environment() -> dict[str, str]:
    """What a run's numbers and speed depend on beside its settings: command, git revision of the current folder,
    versions, machine. Empty entries are left out."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    told = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git": "/".join(filter(None, (git("branch", "--show-current"), git("describe", "--always", "--dirty")))),
        "processes": os.environ.get("WORLD_SIZE", "1"),
        "machine": f"{platform.node()}, {platform.system()} {platform.release()}",
        "GPUs": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)),
        "CPUs": f"{os.cpu_count()} x {cpu_name()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "trlx": __version__,
        **{name: _version(name) for name in PACKAGES.split()},
    }
    return {name: text for name, text in told.items() if text}


def cpu_name() -> str:
    """What the processor calls itself."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
