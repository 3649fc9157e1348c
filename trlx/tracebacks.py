"""Tracebacks of errors that are meant for the user: the user's own frames, and none of this package."""

from __future__ import annotations

import functools
import linecache
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from trlx import logging

F = TypeVar("F", bound=Callable)


def short_errors(fn: F) -> F:
    """A function that users call: errors that it raises on purpose come without frames of this package, unless
    TRLX_TRACEBACKS is "full" or the verbosity "debug"."""

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
    """Takes the frames of this package and of Python's library out of the traceback of an error that a ``raise`` in
    this package made. Of its causes the frames of the user's function and all below stay. Other errors stay whole."""
    if not (getattr(error, "_is_short", False) or _is_on_purpose(error.__traceback__)):
        return
    error._is_short = True  # where one such function calls another, the frames between them go, too
    error.__traceback__ = _without_ours(error.__traceback__)
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    while cause is not None:
        frames = cause.__traceback__
        while frames is not None and _is_inside(frames):
            frames = frames.tb_next
        cause.__traceback__ = frames
        cause = cause.__cause__ or cause.__context__


_HERE = str(Path(__file__).parent) + os.sep
_LIBRARY, _PACKAGES = (sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib"))


def _is_inside(frame: TracebackType) -> bool:
    """Whether it is of this package or of Python's library."""
    file = frame.tb_frame.f_code.co_filename
    return file.startswith(_HERE) or (file.startswith(_LIBRARY) and not file.startswith(_PACKAGES))


def _is_on_purpose(frames: TracebackType | None) -> bool:
    """Whether the innermost frame is a ``raise`` of this package."""
    if frames is None:
        return False
    while frames.tb_next is not None:
        frames = frames.tb_next
    file = frames.tb_frame.f_code.co_filename
    return file.startswith(_HERE) and linecache.getline(file, frames.tb_lineno).lstrip().startswith("raise ")


def _without_ours(frames: TracebackType | None) -> TracebackType | None:
    if frames is None:
        return None
    rest = _without_ours(frames.tb_next)
    return rest if _is_inside(frames) else TracebackType(rest, frames.tb_frame, frames.tb_lasti, frames.tb_lineno)
