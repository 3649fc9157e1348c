"""Messages and progress bars: one verbosity for the whole library; by default only the main process logs.

Environment: ``TRLX_VERBOSITY`` (debug, info, warning, error, critical or a number) sets the first verbosity;
``TRLX_NO_ADVISORY_WARNINGS`` silences `RankLogger.warning_advice`; ``RANK`` is the rank of this process.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from contextlib import nullcontext
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING
from typing import Any

LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR, "critical": CRITICAL}

_BRIEF = "[%(levelname)s] %(message)s"
_EXPLICIT = "[%(levelname)s|%(filename)s:%(lineno)s] %(asctime)s >> %(message)s"
_root = logging.getLogger("trlx")
_bars_shown = True


def get_logger(name: str) -> RankLogger:
    """The logger of a module; pass ``__name__``. Names outside ``trlx`` are put below it, to share its verbosity."""
    logger = logging.getLogger(name if name.split(".")[0] == "trlx" else f"trlx.{name}")
    logger.addFilter(_is_logged)
    return RankLogger(logger, {})


class RankLogger(logging.LoggerAdapter):
    """A standard logger whose calls take the processes that log, ``ranks=[0, 3]``. By default the main process logs;
    ``ranks=[-1]`` means all."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        ranks = kwargs.pop("ranks", None)
        return msg, {**kwargs, "extra": {**(kwargs.get("extra") or {}), "ranks": ranks}}

    def warning_advice(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """A warning that only advises; not logged where TRLX_NO_ADVISORY_WARNINGS is set."""
        if not os.environ.get("TRLX_NO_ADVISORY_WARNINGS"):
            self.warning(msg, *args, **kwargs)


def set_verbosity(level: int | str) -> None:
    """Shows messages of `level` and above: a number of the standard `logging`, or its name.

    Raises:
        ValueError: no level has that name.
    """
    text = str(level).lower()
    if not text.isdigit() and text not in LEVELS:
        raise ValueError(f"Unknown verbosity {level!r}. Known: {', '.join(LEVELS)}, or a number")
    _root.setLevel(LEVELS.get(text) or int(text))


def get_verbosity() -> int:
    """The lowest level that is shown, as a number of the standard `logging`."""
    return _root.level


def enable_explicit_format() -> None:
    """Puts file, line and time in front of every message."""
    _handler.setFormatter(logging.Formatter(_EXPLICIT))


def reset_format() -> None:
    """Back to the brief format."""
    _handler.setFormatter(logging.Formatter(_BRIEF))


def enable_progress_bar() -> None:
    """Shows progress bars (the default)."""
    global _bars_shown
    _bars_shown = True


def disable_progress_bar() -> None:
    """Hides progress bars."""
    global _bars_shown
    _bars_shown = False


def is_progress_bar_enabled() -> bool:
    """Whether progress bars are shown."""
    return _bars_shown


def is_main_process() -> bool:
    """Whether this process has rank 0 in the launcher's environment; true without a launcher."""
    return process_rank() == 0


def process_rank() -> int:
    """The rank of this process in the launcher's environment; 0 without a launcher."""
    return int(os.environ.get("RANK") or 0)


class _Handler(logging.Handler):
    """Prints to stderr, unless the application configured logging itself: then its handlers get our records."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        tqdm = sys.modules.get("tqdm")  # where tqdm is not loaded there is no progress bar to print above
        with tqdm.tqdm.external_write_mode(file=sys.stderr) if tqdm else nullcontext():
            print(self.format(record), file=sys.stderr, flush=True)


def _is_logged(record: logging.LogRecord) -> bool:
    ranks = getattr(record, "ranks", None) or [0]
    return -1 in ranks or process_rank() in ranks


_handler = _Handler()
_root.addHandler(_handler)
reset_format()
set_verbosity(os.environ.get("TRLX_VERBOSITY") or INFO)
