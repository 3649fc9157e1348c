"""Files that a thread writes while training goes on, from copies of tensors in host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
from torch import Tensor

WRITER = "trlx-checkpoint"
"""Name of the threads of `Background`."""

Write = Callable[[], Any]


class Background:
    """Does work in a thread while the program goes on: one piece after the other, in the order of `start`."""

    def __init__(self):
        self._last: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], Any]) -> None:
        """Returns at once. After an error nothing more is done until `wait` has raised it."""
        self._last = threading.Thread(target=self._run, args=(work, self._last), name=WRITER)
        self._last.start()

    def wait(self) -> None:
        """Waits until all work is done.

        Raises:
            BaseException: what the work raised, once.
        """
        if self._last is not None:
            self._last.join()
        error, self._last, self._error = self._error, None, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], Any], before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            if self._error is None:
                work()
        except BaseException as error:  # `wait` raises it in the program's own thread
            self._error = error


def write(writer: Callable[[dict[str, Tensor]], Any], tensors: dict[str, Tensor]) -> None:
    """Calls ``writer(tensors)``, which writes files.

    Inside `postponed` it copies the tensors to host memory, and the call follows later with the copies. If they are
    more than half of the free memory, it calls at once there, too.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    if _copies is None or size > psutil.virtual_memory().available // 2:
        writer(tensors)
    else:
        _copies.writes.append(partial(writer, {name: _copies.of(tensor) for name, tensor in tensors.items()}))


@contextmanager
def postponed(asked: bool = True) -> Iterator[list[Write]]:
    """Inside the block, if `asked`, `write` appends calls to the list that this yields. Not for use in two threads."""
    global _copies
    _copies = _Copies() if asked else None
    try:
        yield _copies.writes if asked else []
    finally:
        _copies = None


class _Copies:
    """Copies of tensors. A weight with several names is copied once, and stays one."""

    def __init__(self):
        self.writes: list[Write] = []
        self._found: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in self._found:
            # keep the original: if it were freed, another tensor could get its address
            self._found[key] = tensor, tensor.detach().to("cpu", copy=True)
        return self._found[key][1]


_copies: _Copies | None = None
