"""The user's functions: how reward_fn and metric_fn are called, and checks of what they return."""

from __future__ import annotations

import copy
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitedTooLong
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trlx.batch import Rollout
from trlx.data.prompts import RESERVED
from trlx.rollout.calling import Arguments, RewardError, UserFunction, short

Score = float | list[float]
"""One number for a response, or one per response token."""


class Scorer:
    """Calls reward_fn in a thread of its own, checks the result.

    Args:
        reward_fn: takes lists of one entry per sample, by those keywords of `trlx.rollout.calling.OFFERED` and those
            keys of the prompts that it names; returns for each sample a number, or one per response token (fewer: the
            rest counts 0), as a list, tuple, array or tensor.
        timeout: seconds that one call may take; None: any time.
        separator: stands between prompt and output in the samples.
    """

    def __init__(
        self,
        reward_fn: Callable[..., Any],
        tokenizer: PreTrainedTokenizerBase,
        timeout: float | None = None,
        separator: str = "",
    ):
        self._function = UserFunction("reward_fn", reward_fn, unasked=RESERVED)
        # fast tokenizers raise "Already borrowed" when one thread changes their padding while another decodes
        self.tokenizer = copy.deepcopy(tokenizer)
        self.timeout = timeout
        self.separator = separator
        self._jobs: queue.SimpleQueue[tuple[Pending, Callable[[Pending], list[Score]]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def check(self, metadata: Iterable[str]) -> None:
        """See `UserFunction.check`."""
        self._function.check(metadata)

    def score(self, rollouts: Sequence[Rollout], step: int = 0, eos_in_outputs: bool = False) -> list[Score]:
        """One score per rollout: a float, or a list of at most one float per response token.

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
            self._thread = threading.Thread(target=_work, args=(self._jobs, device), daemon=True, name="trlx-reward")
            self._thread.start()
        pending = Pending(list(rollouts), self.timeout)
        self._jobs.put((pending, partial(self._call, step=step, eos_in_outputs=eos_in_outputs)))
        return pending

    def _call(self, pending: Pending, step: int, eos_in_outputs: bool) -> list[Score]:
        rollouts = pending.rollouts
        asked = Arguments.of(rollouts, self.tokenizer, step, self.separator, eos_in_outputs)
        samples = asked.offered["samples"]
        pending.first_sample = short(samples[0])
        entries = _entries("reward_fn", self._function(asked), samples)
        return [_checked(*one) for one in zip(range(len(samples)), entries, rollouts, samples, strict=True)]


class Pending:
    """Scores on their way."""

    def __init__(self, rollouts: list[Rollout], timeout: float | None):
        self.rollouts = rollouts
        self.first_sample = "not decoded yet"
        self._timeout = timeout
        self._began = 0.0
        self._started = threading.Event()
        self._future: Future[list[Score]] = Future()

    def result(self) -> list[Score]:
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

    def run(self, fn: Callable[[Pending], list[Score]]) -> None:
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

    def __call__(self, arguments: Arguments) -> dict[str, list[float] | float]:
        """By name, one number per sample or a plain number.

        Raises:
            RewardError: metric_fn raised (its exception is the cause), or returned something else.
        """
        returned, samples = super().__call__(arguments), arguments.offered["samples"]
        if not isinstance(returned, Mapping):
            raise RewardError(f"metric_fn must return a dict of lists or numbers by name, got {repr(returned)[:80]}")
        return {str(name): _metric(name, _plain(values), samples) for name, values in returned.items()}


def _metric(name: str, values: Any, samples: list[str]) -> list[float] | float:
    if _is_number(values):
        return float(values)
    numbers = _entries(f"metric_fn's {name!r}", values, samples)
    for index, number in enumerate(numbers):
        if not _is_number(number):
            raise RewardError(
                f"metric_fn's {name!r} must be numbers, got {repr(number)[:80]} for {short(samples[index])}"
            )
    return [float(number) for number in numbers]


def _work(jobs: queue.SimpleQueue, device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)  # so that "cuda" means in reward_fn what it means in the main thread
    while True:
        pending, fn = jobs.get()
        pending.run(fn)
        del pending, fn  # or the last batch would live as long as this thread


def _entries(name: str, returned: Any, samples: list[str]) -> list[Any]:
    """One plain entry per sample: a number or a list."""
    entries, first = _plain(returned), short(samples[0])
    if not isinstance(entries, list):
        raise RewardError(f"{name} must return one entry per sample, got {repr(returned)[:80]}; first sample: {first}")
    if len(entries) != len(samples):
        raise RewardError(f"{name} returned {len(entries)} entries for {len(samples)} samples; first sample: {first}")
    return [_plain(entry) for entry in entries]


def _checked(index: int, entry: Any, rollout: Rollout, sample: str) -> Score:
    """One sample's score, after checking it."""
    is_dense = isinstance(entry, list)
    numbers = [_plain(number) for number in entry] if is_dense else [entry]
    if not all(map(_is_number, numbers)) or (not numbers and rollout.response):
        problem = f"{repr(entry)[:80]}, which is neither a number nor a list of numbers"
    elif not all(map(math.isfinite, numbers)):
        problem = f"{repr(entry)[:80]}, which is not finite"
    elif is_dense and len(numbers) > max(len(rollout.response), 1):
        problem = f"{len(numbers)} numbers, but the response has {len(rollout.response)} tokens"
    else:
        return [float(number) for number in numbers] if is_dense and len(numbers) != 1 else float(numbers[0])
    raise RewardError(f"reward_fn returned {problem}, for sample {index}: {short(sample)}")


def _plain(value: Any) -> Any:
    """Arrays, tensors and tuples as lists, their scalars as numbers."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
