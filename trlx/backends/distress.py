"""How the processes of a job hear that one of them failed, or was asked to stop.

A process that waits in a collective would hear of it from torch.distributed after hours. So every process has a thread
that polls the job's store once a second.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from trlx import logging
from trlx.background import WRITER
from trlx.rewards.calling import RewardError

POLL = 1.0
"""Seconds between two polls of the store."""
GRACE = 5.0
"""Seconds that a process has to end by itself, with a traceback, after it has heard of an error elsewhere."""
PATIENCE = 20.0
"""Seconds that a process then waits for a checkpoint that it is writing; launchers kill it after 30."""
ANSWER = 3.0
"""Seconds that a failed process waits for the others to hear of it, because the store may end with this process."""

CAUSE, SIGNAL, HEARD = "cause", "signal", "heard"
"""Keys of the store: the first failure and its process; the first signal; how many processes know the failure."""

T = TypeVar("T")

_watch: Watch | None = None
_numbers = itertools.count()


class Interrupted(BaseException):
    """A signal, named in the message, asked the run to save and stop. Raised on every process at the same place.

    Not an Exception, so that ``except Exception`` in a user's function does not catch it.
    """


def shared(error: BaseException) -> BaseException:
    """Marks an error that every process raises at the same place, so nobody has to be told."""
    error.raised_everywhere = True
    return error


def is_shared(error: BaseException) -> bool:
    """Whether every process raises this error, so that collectives still work."""
    return not _is_multiprocess() or getattr(error, "raised_everywhere", False)


@contextmanager
def watching() -> Iterator[None]:
    """While the block runs, this process tells the others of its errors and hears of theirs. Blocks may be nested.

    A process that hears of an error elsewhere and does not leave the block within `GRACE` seconds prints it and exits
    with code 1.
    """
    global _watch
    if _watch is not None or not _is_multiprocess():
        yield
        return
    _watch = Watch(next(_numbers))
    try:
        yield
    except BaseException as error:
        report(error)
        raise
    finally:
        _watch.end()
        _watch = None


def report(error: BaseException) -> None:
    """Tells the other processes of an error here. If another process failed first, adds a note to `error`."""
    if _watch is not None and not is_shared(error):
        _watch.report(error)


def listen(signals: Iterable[int], on_signal: Callable[[int], None]) -> None:
    """From now on another thread calls `on_signal` when one of `signals` reaches any process, even if this one's main
    thread is in a collective. Call it in the main thread, after setting Python handlers for them."""
    if _watch is not None:
        _watch.listen(set(signals), on_signal)


def stop_listening() -> None:
    """Ends the calls of `on_signal`."""
    if _watch is not None:
        _watch.stop_listening()


class ErrorElsewhere(RuntimeError):
    """A function failed on another process; the message has its error's type, message and process."""


SAME_EVERYWHERE = {cls.__name__: cls for cls in (RewardError, Interrupted, KeyboardInterrupt)}
"""Errors that the other processes raise with the same type."""


def attempted(fn: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """(result, None), or (None, the error that `fn` raised)."""
    try:
        return fn(), None
    except BaseException as error:  # the others must hear of every error
        return None, error


def told(error: BaseException | None) -> tuple[str, str, int] | None:
    """Type, message and process of an error, to send."""
    if error is None:
        return None
    known = [name for name, cls in SAME_EVERYWHERE.items() if isinstance(error, cls)]
    return (known or [type(error).__name__])[0], str(error), logging.process_rank()


def raise_everywhere(error: BaseException | None, heard: tuple[str, str, int] | None) -> None:
    """Raises the error of one process on all: `error` on that process, elsewhere what was `told` of it."""
    if error is not None:
        raise shared(error)
    if heard is None:
        return
    kind, message, rank = heard
    if kind not in SAME_EVERYWHERE:
        raise shared(ErrorElsewhere(f"{kind}: {message} (on process {rank})"))
    error = shared(SAME_EVERYWHERE[kind](message))
    if kind == RewardError.__name__:
        error.add_note(f"It was raised on process {rank}")
    raise error


class Watch:
    """The thread of one process."""

    def __init__(self, number: int):
        self._rank, self._size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun restarts processes with the same store; they must not read what the last ones wrote
        self._prefix = f"trlx/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{number}"
        self._failure: str | None = None
        self._cause: str | None = None
        self._signals: set[int] = set()
        self._on_signal: Callable[[int], None] | None = None
        self._lock = threading.Lock()
        self._ending = threading.Event()
        # Python writes a signal's number into this socket at once, even if the main thread is in a collective
        self._arrived, self._wakeup = socket.socketpair()
        self._arrived.setblocking(False)
        self._wakeup.setblocking(False)
        self._previous_wakeup = -1
        self._thread = threading.Thread(target=self._run, daemon=True, name="trlx-watch")
        self._thread.start()

    def report(self, error: BaseException) -> None:
        """Tells of this process's first error; later ones are its consequences."""
        if self._failure is None:
            self._failure = f"process {self._rank} failed with {type(error).__name__}: {error}"
            self._stop()
            if self._cause is not None:
                error.add_note(f"First, {self._cause}")

    def listen(self, signals: set[int], on_signal: Callable[[int], None]) -> None:
        self._signals, self._on_signal = signals, on_signal
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    def stop_listening(self) -> None:
        with self._lock:
            if self._on_signal is not None:
                signal.set_wakeup_fd(self._previous_wakeup)
            self._on_signal = None

    def end(self) -> None:
        self._stop()
        self._arrived.close()
        self._wakeup.close()

    def _stop(self) -> None:
        self._ending.set()
        self._wakeup.send(b"\0")
        self._thread.join(2 * ANSWER)

    def _run(self) -> None:
        try:
            store = self._connected()
            while store is not None and not self._ending.is_set():
                self._look(store)
            if store is not None and self._failure is not None:
                self._tell(store)
        except (dist.DistError, OSError):
            self._cause = self._cause or "the main process, or its launcher, is gone without a word"
            self._leave(self._cause)

    def _connected(self) -> dist.Store | None:
        """This thread's own connection to the job's store; None if the run ends before there is a store."""
        deadline = None
        while deadline is None or time.monotonic() < deadline:
            try:
                # TCPStore prints warnings until there is a server, so try the port first
                socket.create_connection(self._address, timeout=ANSWER).close()
            except OSError:
                if self._ending.wait(0.2) and deadline is None:
                    deadline = time.monotonic() + (ANSWER if self._failure is not None else 0.0)
                continue
            patience = timedelta(seconds=60)
            client = dist.TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=patience)
            return dist.PrefixStore(self._prefix, client)
        return None

    def _look(self, store: dist.Store) -> None:
        ready, _, _ = select.select([self._arrived], [], [], POLL)
        for number in self._arrived.recv(4096) if ready else b"":
            if number in self._signals:
                store.compare_set(SIGNAL, "", str(number))
        if self._on_signal is not None and store.check([SIGNAL]):
            with self._lock:
                if self._on_signal is not None:
                    self._on_signal(int(store.get(SIGNAL)))
        if store.check([CAUSE]):
            self._cause = store.get(CAUSE).decode()
            store.add(HEARD, 1)
            self._leave(self._cause)

    def _tell(self, store: dist.Store) -> None:
        first = store.compare_set(CAUSE, "", self._failure).decode()
        if self._cause is None:
            store.add(HEARD, 1)
        self._cause = first if first != self._failure else None
        deadline = time.monotonic() + ANSWER
        while store.add(HEARD, 0) < self._size and time.monotonic() < deadline:
            time.sleep(0.05)

    def _leave(self, cause: str) -> None:
        """Ends this process unless its main thread ends within `GRACE` seconds."""
        if not self._ending.wait(GRACE):
            print(f"[ERROR] Process {self._rank} ends because {cause}", file=sys.stderr, flush=True)
            for thread in threading.enumerate():
                if thread.name == WRITER:  # a checkpoint that training has passed
                    thread.join(PATIENCE)
            sys.stdout.flush()
            os._exit(1)


def _is_multiprocess() -> bool:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and int(os.environ["WORLD_SIZE"]) > 1
