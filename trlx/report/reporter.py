"""While a run goes on: its alarms and its environment as files, and its report page, written again and again."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from trlx.logging import get_logger
from trlx.report.environment import environment
from trlx.report.page import write_page
from trlx.tracking import ALARMS, ENVIRONMENT, Sink

logger = get_logger(__name__)

SHARE = 0.01
"""The page takes at most this share of a run's time."""
SECONDS_BETWEEN_PAGES = 10.0
"""And it is written no more often than this."""


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


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
