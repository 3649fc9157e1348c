"""What a failed command tells, and the exit code that it ends with."""

from __future__ import annotations

import traceback

from trlx.tracebacks import on_purpose

BAD_INPUT, FAILED = 2, 1
"""Exit codes: what was typed, or a file that it names, is wrong; a run failed."""


def exit_code(error: Exception) -> int:
    """2 if what the user wrote is wrong, else 1."""
    is_input = isinstance(error, (ValueError, TypeError, ImportError, OSError))
    is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError))
    wrong = is_missing or (
        is_input and not isinstance(error, (ChildProcessError, ConnectionError)) and on_purpose(error)
    )
    return BAD_INPUT if wrong else FAILED


def sentence(error: Exception) -> str:
    """The message of an error, with its type and the way to its traceback where nobody meant it for the user."""
    told = [str(error), *getattr(error, "__notes__", [])]
    if error.__cause__ is not None and error.__cause__.__traceback__ is not None:  # of a function of the user's
        *_, frame = traceback.extract_tb(error.__cause__.__traceback__)
        told[0] += f" ({frame.filename}, line {frame.lineno})"
    if not on_purpose(error):
        told = [f"{type(error).__name__}: {told[0]}", *told[1:], "TRLX_TRACEBACKS=full shows where"]
    return ". ".join(part.rstrip(".") for part in told)
