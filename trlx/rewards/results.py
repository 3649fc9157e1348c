"""What reward functions return: checked, and summed up into one score per sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trlx.batch import Rollout
from trlx.rewards.alignment import Alignment
from trlx.rewards.calling import Arguments, RewardError, short
from trlx.rewards.weighted import Part


@dataclass(frozen=True, slots=True)
class Scored:
    """What is said about one sample."""

    score: float | list[float]
    """One number for a response, or one per response token."""
    parts: dict[str, float] = field(default_factory=dict)
    """By name, what the score is made of, before weights and summed over tokens; empty where nothing is named."""


def scored(
    parts: Sequence[Part],
    returned: Sequence[Any],
    rollouts: Sequence[Rollout],
    arguments: Arguments,
    alignment: Alignment,
) -> list[Scored]:
    """One `Scored` for each rollout, of what each part returned; `alignment` is for those without output_ids.

    Raises:
        RewardError: something of another length or shape, or not finite. The message shows the sample in question.
    """
    columns = list(_columns(parts, returned, rollouts, arguments.offered, alignment))
    weights = [weight for _, weight, _ in columns]
    named = [name for name, _, _ in columns if name is not None]
    if "mean" in named:
        raise RewardError("No part of a reward can be called 'mean': reward/mean is the mean of the sum. Rename it")
    rows = zip(*(scores for _, _, scores in columns), strict=True)
    return [
        Scored(_weighted_sum(weights, row, len(rollout.response)), dict(zip(named, map(total, row), strict=False)))
        for row, rollout in zip(rows, rollouts, strict=True)
    ]


def total(score: float | list[float]) -> float:
    """A score as one number."""
    return sum(score) if isinstance(score, list) else score


def means(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By name, the mean over all that have a part of this name."""
    found: dict[str, list[float]] = {}
    for one in parts:
        for name, number in one.items():
            found.setdefault(name, []).append(number)
    return {name: sum(numbers) / len(numbers) for name, numbers in found.items()}


def entries(name: str, returned: Any, samples: Sequence[str]) -> list[Any]:
    """One plain entry per sample: a number, or a list of what may be numbers.

    Raises:
        RewardError: there is not one entry per sample.
    """
    found, first = plain(returned), short(samples[0])
    if not isinstance(found, list):
        raise RewardError(f"{name} must return one entry per sample, got {repr(returned)[:80]}; first sample: {first}")
    if len(found) != len(samples):
        raise RewardError(f"{name} returned {len(found)} entries for {len(samples)} samples; first sample: {first}")
    listed = map(plain, found)
    return [[plain(number) for number in entry] if isinstance(entry, list) else entry for entry in listed]


def plain(value: Any) -> Any:
    """Arrays, tensors and tuples as lists, their scalars as numbers."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def is_number(value: Any) -> bool:
    """Whether it is a plain number; True and False are."""
    return isinstance(value, (int, float))


def _columns(
    parts: Sequence[Part],
    returned: Sequence[Any],
    rollouts: Sequence[Rollout],
    offered: Mapping[str, Any],
    alignment: Alignment,
) -> Iterator[tuple[str | None, float, list[float | list[float]]]]:
    """(name, weight, scores) of every part; those of a function that returns a dict are parts of their own."""
    for part, value in zip(parts, returned, strict=True):
        for key, one in _named(part.function.name, value):
            name = f"{part.function.name}'s {key!r}" if key else part.function.name
            scores = _plain_scores(name, one, rollouts, offered["samples"])
            if "output_ids" not in part.function.named:
                scores = alignment(name, scores, [rollout.response for rollout in rollouts], offered["outputs"])
            _check_lengths(name, scores, rollouts, offered["samples"])
            yield "/".join(filter(None, (part.name, key))) or None, part.weight, scores


def _named(name: str, returned: Any) -> list[tuple[str, Any]]:
    if not isinstance(returned, Mapping):
        return [("", returned)]
    if not returned or not all(map(str, returned)):
        raise RewardError(f"{name} must return a dict of lists by name, got {repr(returned)[:80]}")
    return [(str(key), value) for key, value in returned.items()]


def _plain_scores(
    name: str, returned: Any, rollouts: Sequence[Rollout], samples: Sequence[str]
) -> list[float | list[float]]:
    """One score per sample, of finite numbers. Where each is a list of one number they are a column of scalars."""
    found, scores = entries(name, returned, samples), []
    is_column = all(isinstance(entry, list) and len(entry) == 1 and is_number(entry[0]) for entry in found)
    for index, (entry, rollout) in enumerate(zip(found, rollouts, strict=True)):
        numbers = entry if isinstance(entry, list) else [entry]
        if not all(map(is_number, numbers)) or (not numbers and rollout.response):
            problem = "which is neither a number nor a list of numbers"
            raise _wrong(name, f"{repr(entry)[:80]}, {problem}", index, samples)
        if not all(map(math.isfinite, numbers)):
            raise _wrong(name, f"{repr(entry)[:80]}, which is not finite", index, samples)
        is_dense = isinstance(entry, list) and rollout.response and not is_column
        scores.append([float(number) for number in numbers] if is_dense else float(sum(numbers)))
    return scores


def _check_lengths(
    name: str, scores: Sequence[float | list[float]], rollouts: Sequence[Rollout], samples: Sequence[str]
) -> None:
    for index, (score, rollout) in enumerate(zip(scores, rollouts, strict=True)):
        if isinstance(score, list) and len(score) > len(rollout.response):
            numbers = f"{len(score)} numbers, but the response has {len(rollout.response)} tokens (see output_ids)"
            raise _wrong(name, numbers, index, samples)


def _wrong(name: str, what: str, index: int, samples: Sequence[str]) -> RewardError:
    return RewardError(f"{name} returned {what}, for sample {index}: {short(samples[index])}")


def _weighted_sum(weights: Sequence[float], scores: Sequence[float | list[float]], length: int) -> float | list[float]:
    """A number; with a dense score among them a list of `length`, in which numbers stand at the last token."""
    pairs = list(zip(weights, scores, strict=True))
    if not any(isinstance(score, list) for score in scores):
        return sum(weight * score for weight, score in pairs)
    tokens = [0.0] * length
    for weight, score in pairs:
        placed = enumerate(score) if isinstance(score, list) else [(length - 1, score)]
        for index, number in placed:
            tokens[index] += weight * number
    return tokens
