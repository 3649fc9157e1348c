"""CPU seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PHASES = ("generate", "reward", "score", "update", "rest")


class Stopwatch:
    """CPU seconds of all threads, each counted under one phase: `within` another one, under the inner.

    Args:
        rest: the phase of everything that is within none.
    """

    def __init__(self, rest: str = "rest"):
        self.phase = rest
        self.reset()

    def reset(self) -> None:
        """Forgets what was measured, e.g. a warm-up."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.tokens = 0
        """Response tokens trained on (of reward models: tokens read); a contender counts them."""
        self.since = time.process_time()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Counts the block under `phase`."""
        outer = self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def timed(self, phase: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, counted under `phase`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return fn(*args, **kwargs)

        return wrapped

    def result(self) -> dict[str, float]:
        """Seconds of each phase and their sum, and the tokens."""
        self._switch(self.phase)
        return {**self.seconds, "total": sum(self.seconds.values()), "tokens": self.tokens}

    def _switch(self, phase: str) -> str:
        now, outer = time.process_time(), self.phase
        self.seconds[outer] += now - self.since
        self.phase, self.since = phase, now
        return outer
