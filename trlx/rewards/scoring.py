"""Calls reward_fn in a thread of its own, and metric_fn."""

from __future__ import annotations

import asyncio
import copy
import inspect
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trlx.batch import Rollout
from trlx.data.prompts import RESERVED
from trlx.rewards.alignment import Alignment
from trlx.rewards.calling import Arguments, RewardError, UserFunction, call_all, short
from trlx.rewards.results import Scored, entries, is_number, plain, scored
from trlx.rewards.weighted import parts_of


class Scorer:
    """Calls reward_fn in a thread of its own and checks what it returns.

    reward_fn is a function, a list or dict of functions, or `WeightedRewards`; docs/rewards.md says what it may return.
    One call may take `timeout` seconds. In the samples, `separator` stands between prompt and output.
    """

    def __init__(
        self, reward_fn: Any, tokenizer: PreTrainedTokenizerBase, timeout: float | None = None, separator: str = ""
    ):
        self._parts = parts_of(reward_fn)
        # fast tokenizers raise "Already borrowed" when one thread changes their padding while another decodes
        self.tokenizer = copy.deepcopy(tokenizer)
        self._alignment = Alignment(self.tokenizer)
        self.timeout = timeout
        self.separator = separator
        self._jobs: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # one loop for all calls: connections that a client keeps open belong to the loop they were opened in
        self._runner = asyncio.Runner()

    def check(self, metadata: Iterable[str]) -> None:
        """See `UserFunction.check`."""
        for part in self._parts:
            part.check(metadata)

    def score(self, rollouts: Sequence[Rollout], step: int = 0, eos_in_outputs: bool = False) -> list[Scored]:
        """One `Scored` per rollout.

        Raises a RewardError, which shows the sample, if reward_fn raises, takes too long, or returns something wrong.
        """
        return self.submit(rollouts, step, eos_in_outputs).result()

    def submit(self, rollouts: Sequence[Rollout], step: int = 0, eos_in_outputs: bool = False) -> Pending:
        """Starts scoring and returns at once; ``.result()`` waits and then returns or raises as `score`."""
        if self._thread is None:
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            shared = (self._jobs, self._runner, device)
            # a daemon, because a hanging reward_fn must not keep the process alive
            self._thread = threading.Thread(target=_work, args=shared, daemon=True, name="trlx-reward")
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None)
        pending = Pending(partial(self._call, list(rollouts), step, eos_in_outputs), self.timeout)
        self._jobs.put(pending)
        return pending

    def _call(self, rollouts: list[Rollout], step: int, eos_in_outputs: bool, pending: Pending) -> list[Scored]:
        asked = Arguments(rollouts, self.tokenizer, step, self.separator, eos_in_outputs)
        pending.first_sample = short(asked.offered["samples"][0])
        returned = call_all(self._parts, asked, self._runner)
        return scored(self._parts, returned, asked, self._alignment)


class Pending:
    """A call of reward_fn that waits or runs."""

    def __init__(self, call: Callable[[Pending], list[Scored]], timeout: float | None):
        self.first_sample = "not decoded yet"
        self._call = call
        self._timeout = timeout
        self._began: Future[float] = Future()
        self._scored: Future[list[Scored]] = Future()

    def result(self) -> list[Scored]:
        """Waits, then returns or raises as `Scorer.score`."""
        limit = self._timeout
        try:
            # the call before this one may hang, so the wait for the start is limited, too
            began = self._began.result(limit)
            return self._scored.result(None if limit is None else max(began + limit - time.monotonic(), 0.0))
        except TimeoutError:
            took = f"took more than train.reward_timeout = {limit} seconds"
            raise RewardError(f"reward_fn {took}; first sample: {self.first_sample}") from None

    def run(self) -> None:
        """Makes the call in the present thread and keeps what it returns or raises."""
        self._began.set_result(time.monotonic())
        try:
            self._scored.set_result(self._call(self))
        except BaseException as error:  # the waiting thread must hear of everything, or it would wait forever
            self._scored.set_exception(error)


def _work(jobs: queue.SimpleQueue[Pending | None], runner: asyncio.Runner, device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)  # "cuda" must mean the same device in reward_fn as in the main thread
    with runner:
        while job := jobs.get():
            job.run()
            del job  # or the last batch would live as long as this thread


class Metric(UserFunction):
    """metric_fn, and a check of what it returns."""

    def __init__(self, metric_fn: Callable[..., Any]):
        super().__init__("metric_fn", metric_fn, unasked=RESERVED[:3])
        if inspect.iscoroutinefunction(metric_fn):
            raise TypeError("metric_fn must be a plain function: write def in place of async def")

    def __call__(self, arguments: Arguments) -> dict[str, list[float] | float]:
        """By name, one number per sample or a plain number; a RewardError if metric_fn raises or returns others."""
        returned, samples = super().__call__(arguments), arguments.offered["samples"]
        if not isinstance(returned, Mapping):
            raise RewardError(f"metric_fn must return a dict of lists or numbers by name, got {repr(returned)[:80]}")
        return {str(name): _metric(f"metric_fn's {name!r}", plain(found), samples) for name, found in returned.items()}


def _metric(name: str, found: Any, samples: list[str]) -> list[float] | float:
    if is_number(found):
        return float(found)
    numbers = entries(name, found, samples)
    for number, sample in zip(numbers, samples, strict=True):
        if not is_number(number):
            raise RewardError(f"{name} must be numbers, got {repr(number)[:80]} for {short(sample)}")
    return [float(number) for number in numbers]
