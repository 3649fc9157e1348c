"""Tracebacks of errors that are meant for the user: the user's frames, without those of this package."""

from __future__ import annotations

import functools
import linecache
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import TypeVar

from trlx import logging

F = TypeVar("F", bound=Callable)

TOLD_ONCE = "TRLX_TOLD_ONCE"
"""Set by a launcher that prints, for all processes, what the first one leaves in torchrun's error file."""


def short_errors(fn: F) -> F:
    """Decorates a function that users call: errors raised on purpose come without frames of this package, unless
    TRLX_TRACEBACKS is "full" or the verbosity is "debug"."""

    @functools.wraps(fn)
    def called(*args, **kwargs):
        try:
            return fn(*args, **kwargs)
        except BaseException as error:
            if os.environ.get("TRLX_TRACEBACKS") != "full" and logging.get_verbosity() > logging.DEBUG:
                shorten(error)
            raise

    return called


def shorten(error: BaseException) -> None:
    """Removes this package's and Python's frames from the traceback of an error that a ``raise`` of this package made.

    Its causes keep the frames of the user's function and all below. Other errors stay as they are.
    """
    if not on_purpose(error):
        return
    error._is_short = True  # short_errors of a caller then removes the frames in between
    error.__traceback__ = _without_ours(error.__traceback__)
    cause = error
    while cause := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__):
        while cause.__traceback__ is not None and _is_inside(cause.__traceback__):
            cause.__traceback__ = cause.__traceback__.tb_next


_HERE = str(Path(__file__).parent) + os.sep
_LIBRARY, _PACKAGES = (sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib"))


def _is_inside(frame: TracebackType) -> bool:
    """Whether the frame belongs to this package or to Python's library."""
    file = frame.tb_frame.f_code.co_filename
    return file.startswith(_HERE) or (file.startswith(_LIBRARY) and not file.startswith(_PACKAGES))


def on_purpose(error: BaseException) -> bool:
    """Whether a ``raise`` of this package made the error, so that its message is for the user."""
    if getattr(error, "_is_short", False):
        return True
    *_, (frame, line) = walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    return file.startswith(_HERE) and linecache.getline(file, line).lstrip().startswith("raise ")


def _without_ours(frames: TracebackType | None) -> TracebackType | None:
    if frames is None:
        return None
    rest = _without_ours(frames.tb_next)
    return rest if _is_inside(frames) else TracebackType(rest, frames.tb_frame, frames.tb_lasti, frames.tb_lineno)
