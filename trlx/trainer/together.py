"""Running the user's functions on the main process with one outcome for all: the same result, or the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from trlx.backends.base import Backend
from trlx.rollout.scoring import RewardError

T = TypeVar("T")


def on_main(backend: Backend, fn: Callable[[], T]) -> T:
    """`fn()` called on the main process, its result on every process.

    Raises:
        RewardError: on every process, when `fn` raised it on the main one. The others would wait for it forever.
    """
    value, error = None, None
    if backend.is_main:
        try:
            value = fn()
        except RewardError as raised:
            error = raised
    value, message = backend.broadcast_object((value, error and str(error)))
    _raise(error, message)
    return value


def on_each_rank(backend: Backend, fn: Callable[[], list[T]]) -> list[T]:
    """`fn()` called on the leading process of every data rank, the lists concatenated in rank order.

    Raises:
        RewardError: on every process, when `fn` raised it on any.
    """
    value, error = [], None
    if backend.leads:
        try:
            value = fn()
        except RewardError as raised:
            error = raised
    messages = [message for message in backend.gather_objects([error and str(error)]) if message]
    _raise(error, messages[0] if messages else None)
    return backend.gather_objects(value)


def _raise(error: RewardError | None, message: str | None) -> None:
    if error is not None:
        raise error
    if message is not None:
        raise RewardError(message)
