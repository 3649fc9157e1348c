"""Running functions on some processes with one outcome for all: the same result, or the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from trlx import logging
from trlx.backends.base import Backend
from trlx.backends.distress import shared
from trlx.rewards.scoring import RewardError
from trlx.run.guards import Interrupted

T = TypeVar("T")


class ErrorElsewhere(RuntimeError):
    """A function that runs on another process failed there; the message has type, message and process of its error."""


SAME_EVERYWHERE = {cls.__name__: cls for cls in (RewardError, Interrupted, KeyboardInterrupt)}
"""Errors that other processes raise under their own type."""


def on_main(backend: Backend, fn: Callable[[], T]) -> T:
    """`fn()` called on the main process, its result on every process.

    Raises:
        BaseException: what `fn` raised, on every process; where it did not run, RewardError and `Interrupted` as they
            are, anything else as `ErrorElsewhere`. The others would wait for it forever.
    """
    value, error = _attempt(fn) if backend.is_main else (None, None)
    value, told = backend.broadcast_object((value, _told(error)))
    _raise(error, told)
    return value


def on_each_rank(backend: Backend, fn: Callable[[], list[T]]) -> list[T]:
    """`fn()` called on the leading process of every data rank, the lists concatenated in rank order.

    Raises:
        BaseException: on every process, what `fn` raised on any, as `on_main` does.
    """
    value, error = _attempt(fn) if backend.leads else (None, None)
    told = [each for each in backend.gather_objects([_told(error)]) if each]
    _raise(error, told[0] if told else None)
    return backend.gather_objects(value or [])


def _attempt(fn: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return fn(), None
    except BaseException as error:  # of whatever it is the others must hear
        return None, error


def _told(error: BaseException | None) -> tuple[str, str, int] | None:
    """Type, message and process of an error, as they are sent."""
    if error is None:
        return None
    known = [name for name, cls in SAME_EVERYWHERE.items() if isinstance(error, cls)]
    return (known or [type(error).__name__])[0], str(error), logging.process_rank()


def _raise(error: BaseException | None, told: tuple[str, str, int] | None) -> None:
    if error is not None:
        raise shared(error)
    if told is None:
        return
    kind, message, rank = told
    if kind not in SAME_EVERYWHERE:
        raise shared(ErrorElsewhere(f"{kind}: {message} (on process {rank})"))
    error = shared(SAME_EVERYWHERE[kind](message))
    if kind == RewardError.__name__:
        error.add_note(f"It was raised on process {rank}")
    raise error
