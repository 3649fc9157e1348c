"""Threads that wait for servers, and that a program does not wait for when it ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

Job = tuple[Future, Callable[..., Any], tuple[Any, ...]]


class Threads:
    """Calls functions in at most `count` threads, in the order of `submit`.

    The threads are daemons: Python joins those of a `ThreadPoolExecutor` before a program ends, which after an error
    would last as long as the slowest server.
    """

    def __init__(self, count: int):
        self.count, self.started = count, 0
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future:
        """Begins ``fn(*args)``; the future has its result or its error."""
        future: Future = Future()
        self._jobs.put((future, fn, args))
        if self.started < self.count:
            self.started += 1
            threading.Thread(target=_work, args=(self._jobs,), daemon=True, name="trlx-vllm").start()
        return future

    def close(self) -> None:
        """Drops the calls that have not begun, and ends each thread after its present one."""
        with suppress(queue.Empty):
            while job := self._jobs.get_nowait():
                job[0].cancel()
        for _ in range(self.started):
            self._jobs.put(None)


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    while job := jobs.get():
        future, fn, args = job
        try:
            future.set_result(fn(*args))
        except BaseException as error:  # whoever waits must hear of everything
            future.set_exception(error)
        del job, future, fn, args
