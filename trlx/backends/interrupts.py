"""What asks a run to leave: SIGTERM and SIGUSR1, which SLURM sends, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from trlx import logging
from trlx.backends import distress
from trlx.backends.base import Backend
from trlx.backends.distress import Interrupted


class Interrupts:
    """While the block runs, SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) only set ``received``, on every process of the job.
    A second Ctrl-C raises KeyboardInterrupt at once.

    SLURM sends SIGTERM or SIGUSR1 before it takes a machine away.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    present: Interrupts | None = None
    """The instance of the run in progress."""

    def __init__(self):
        self.received: str | None = None
        self.at_once = False
        """Whether a signal raises `Interrupted` in the main thread."""
        self._elsewhere: str | None = None
        self._presses = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        # Python handles signals in the main thread only; a run in another thread ignores them
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                # a shell makes its background jobs ignore Ctrl-C; keep that
                if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
            distress.listen(self.SIGNALS, self._receive_elsewhere)
        Interrupts.present = self
        return self

    def __exit__(self, *exc_info) -> None:
        Interrupts.present = None
        distress.stop_listening()
        time.sleep(0)  # a last signal of `_receive_elsewhere` arrives here, while its handler is still set
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, frame) -> None:
        self._presses += number == signal.SIGINT
        if self._presses > 1:
            raise KeyboardInterrupt
        self.received = self.received or self._elsewhere or signal.Signals(number).name
        if number == signal.SIGINT and logging.is_main_process():
            with suppress(RuntimeError):  # the signal interrupted another print
                print("\nCtrl-C: saving as soon as possible; once more stops at once", file=sys.stderr, flush=True)
        if self.at_once:
            raise Interrupted(self.received)

    def _receive_elsewhere(self, number: int) -> None:
        """Called in another thread when any process got a signal. Passes it to the main thread."""
        if self.received is None and self._elsewhere is None:
            self._elsewhere = signal.Signals(number).name
            # only a real signal interrupts a system call in which the main thread waits
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)


@contextmanager
def interruptible() -> Iterator[None]:
    """In this block a signal, even an earlier one, raises `Interrupted` at once. For long waits inside `on_main` and
    `on_each_rank`, which then raise it on every process."""
    interrupts = Interrupts.present or Interrupts()  # without a run, one that receives nothing
    interrupts.at_once = True
    try:
        if interrupts.received is not None:
            raise Interrupted(interrupts.received)
        yield
    finally:
        interrupts.at_once = False


def asked_to_leave() -> bool:
    """Whether a signal asked this process's run to leave; also for threads."""
    return Interrupts.present is not None and Interrupts.present.received is not None


def leave_if_asked(backend: Backend) -> None:
    """Ends the run if a signal asked for it. Call it on every process, where a checkpoint can be saved.

    Raises:
        Interrupted: on every process, if any got a signal.
    """
    if Interrupts.present is None:
        return
    received = Interrupts.present.received
    if backend.any_process(received is not None):
        by_hand = backend.any_process(received == signal.SIGINT.name)
        name = signal.SIGINT.name if by_hand else received or "a signal to another process"
        raise distress.shared(Interrupted(name))
