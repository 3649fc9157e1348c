"""The user's functions: how reward_fn and metric_fn are called, and checks of what they return."""

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
from concurrent.futures import TimeoutError as WaitedTooLong
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trlx.batch import Rollout
from trlx.data.prompts import RESERVED
from trlx.rewards.alignment import Alignment
from trlx.rewards.calling import Arguments, RewardError, UserFunction, call_all, short
from trlx.rewards.results import Scored, entries, is_number, plain, scored
from trlx.rewards.weighted import WeightedRewards, parts_of


class Scorer:
    """Calls reward_fn in a thread of its own, checks the result.

    Args:
        reward_fn: takes lists of one entry per sample, by those keywords of `trlx.rewards.calling.OFFERED` and those
            keys of the prompts that it names; returns for each sample a number, or one per response token (fewer: the
            rest counts 0), as a list, tuple, array or tensor; or a dict of these by name, to be summed up. May be
            ``async def``; or a list of functions, or `WeightedRewards`.
        timeout: seconds that one call may take; None: any time.
        separator: stands between prompt and output in the samples.
    """

    def __init__(
        self,
        reward_fn: Callable[..., Any] | Sequence[Callable[..., Any]] | WeightedRewards,
        tokenizer: PreTrainedTokenizerBase,
        timeout: float | None = None,
        separator: str = "",
    ):
        self._parts = parts_of(reward_fn)
        # fast tokenizers raise "Already borrowed" when one thread changes their padding while another decodes
        self.tokenizer = copy.deepcopy(tokenizer)
        self._alignment = Alignment(self.tokenizer)
        self.timeout = timeout
        self.separator = separator
        self._jobs: queue.SimpleQueue[tuple[Pending, Callable[[Pending], list[Scored]]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # one loop for all calls: connections that a client keeps open belong to the loop they were opened in
        self._runner = asyncio.Runner()

    def check(self, metadata: Iterable[str]) -> None:
        """See `UserFunction.check`."""
        for part in self._parts:
            part.function.check(metadata)

    def score(self, rollouts: Sequence[Rollout], step: int = 0, eos_in_outputs: bool = False) -> list[Scored]:
        """One score per rollout: a float, or a list of one float per response token; and the parts it is made of.

        Raises:
            RewardError: reward_fn raised (its exception is the cause), timed out, or returned something of another
                length or shape, or not finite. The message shows the sample in question.
        """
        return self.submit(rollouts, step, eos_in_outputs).result()

    def submit(self, rollouts: Sequence[Rollout], step: int = 0, eos_in_outputs: bool = False) -> Pending:
        """Starts scoring and returns at once; ``.result()`` waits for what `score` returns or raises."""
        if self._thread is None:
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            # a daemon, because a hanging reward_fn must not keep the process alive
            parts = (self._jobs, self._runner, device)
            self._thread = threading.Thread(target=_work, args=parts, daemon=True, name="trlx-reward")
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None)
        pending = Pending(list(rollouts), self.timeout)
        self._jobs.put((pending, partial(self._call, step=step, eos_in_outputs=eos_in_outputs)))
        return pending

    def _call(self, pending: Pending, step: int, eos_in_outputs: bool) -> list[Scored]:
        rollouts = pending.rollouts
        asked = Arguments.of(rollouts, self.tokenizer, step, self.separator, eos_in_outputs)
        pending.first_sample = short(asked.offered["samples"][0])
        returned = call_all([part.function for part in self._parts], asked, self._runner)
        return scored(self._parts, returned, rollouts, asked, self._alignment)


class Pending:
    """Scores on their way."""

    def __init__(self, rollouts: list[Rollout], timeout: float | None):
        self.rollouts = rollouts
        self.first_sample = "not decoded yet"
        self._timeout = timeout
        self._began = 0.0
        self._started = threading.Event()
        self._future: Future[list[Scored]] = Future()

    def result(self) -> list[Scored]:
        """Waits for the scores.

        Raises:
            RewardError: see `Scorer.score`.
        """
        try:
            if not self._started.wait(self._timeout):  # the call before this one hangs
                raise WaitedTooLong
            left = None if self._timeout is None else max(self._began + self._timeout - time.monotonic(), 0.0)
            return self._future.result(left)
        except WaitedTooLong:
            limit = f"train.reward_timeout = {self._timeout} seconds"
            raise RewardError(f"reward_fn took more than {limit}; first sample: {self.first_sample}") from None

    def run(self, fn: Callable[[Pending], list[Scored]]) -> None:
        """Calls `fn` in the present thread and keeps what it returns or raises."""
        self._began = time.monotonic()
        self._started.set()
        try:
            self._future.set_result(fn(self))
        except BaseException as error:  # the waiting thread must hear of everything, or it would wait forever
            self._future.set_exception(error)


class Metric(UserFunction):
    """metric_fn, and a check of what it returns."""

    def __init__(self, metric_fn: Callable[..., Any]):
        super().__init__("metric_fn", metric_fn, unasked=RESERVED[:3])
        if inspect.iscoroutinefunction(metric_fn):
            raise TypeError("metric_fn must be a plain function: write def in place of async def")

    def __call__(self, arguments: Arguments) -> dict[str, list[float] | float]:
        """By name, one number per sample or a plain number.

        Raises:
            RewardError: metric_fn raised (its exception is the cause), or returned something else.
        """
        returned, samples = super().__call__(arguments), arguments.offered["samples"]
        if not isinstance(returned, Mapping):
            raise RewardError(f"metric_fn must return a dict of lists or numbers by name, got {repr(returned)[:80]}")
        return {str(name): _metric(name, plain(values), samples) for name, values in returned.items()}


def _metric(name: str, values: Any, samples: list[str]) -> list[float] | float:
    if is_number(values):
        return float(values)
    numbers = entries(f"metric_fn's {name!r}", values, samples)
    for index, number in enumerate(numbers):
        if not is_number(number):
            raise RewardError(
                f"metric_fn's {name!r} must be numbers, got {repr(number)[:80]} for {short(samples[index])}"
            )
    return [float(number) for number in numbers]


def _work(jobs: queue.SimpleQueue, runner: asyncio.Runner, device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)  # so that "cuda" means in reward_fn what it means in the main thread
    with runner:
        while job := jobs.get():
            pending, fn = job
            pending.run(fn)
            del job, pending, fn  # or the last batch would live as long as this thread
