"""What reward functions return: checked, and summed up into one score per sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trlx.batch import Rollout
from trlx.rollout.calling import Arguments, RewardError, short
from trlx.rollout.weighted import Part


@dataclass(frozen=True, slots=True)
class Scored:
    """What is said about one sample."""

    score: float | list[float]
    """One number for a response, or one per response token."""
    parts: dict[str, float] = field(default_factory=dict)
    """By name, what the score is made of, before weights and summed over tokens; empty where nothing is named."""


def scored(
    parts: Sequence[Part], returned: Sequence[Any], rollouts: Sequence[Rollout], arguments: Arguments
) -> list[Scored]:
    """One `Scored` for each rollout, of what each part returned.

    Raises:
        RewardError: something of another length or shape, or not finite. The message shows the sample in question.
    """
    columns = list(_columns(parts, returned, rollouts, arguments.offered["samples"]))
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
    parts: Sequence[Part], returned: Sequence[Any], rollouts: Sequence[Rollout], samples: Sequence[str]
) -> Iterator[tuple[str | None, float, list[float | list[float]]]]:
    """(name, weight, scores) of every part; those of a function that returns a dict are parts of their own."""
    for part, value in zip(parts, returned, strict=True):
        if not isinstance(value, Mapping):
            yield part.name, part.weight, _checked(part.function.name, value, rollouts, samples)
            continue
        if not value:
            raise RewardError(f"{part.function.name} returned a dict with nothing in it; give a part a name and a list")
        for key, one in value.items():
            name = str(key) if part.name is None else f"{part.name}/{key}"
            yield name, part.weight, _checked(f"{part.function.name}'s {key!r}", one, rollouts, samples)


def _checked(
    name: str, returned: Any, rollouts: Sequence[Rollout], samples: Sequence[str]
) -> list[float | list[float]]:
    """One score per sample, after checking them. Where each is a list of one number they are a column of scalars."""
    found = entries(name, returned, samples)
    if all(isinstance(entry, list) and len(entry) == 1 and is_number(entry[0]) for entry in found):
        found = [entry[0] for entry in found]
    return [_number_or_list(name, *one) for one in zip(range(len(found)), found, rollouts, samples, strict=True)]


def _number_or_list(name: str, index: int, entry: Any, rollout: Rollout, sample: str) -> float | list[float]:
    numbers, length = entry if isinstance(entry, list) else [entry], len(rollout.response)
    if not all(map(is_number, numbers)) or (not numbers and length):
        problem = f"{repr(entry)[:80]}, which is neither a number nor a list of numbers"
    elif not all(map(math.isfinite, numbers)):
        problem = f"{repr(entry)[:80]}, which is not finite"
    elif isinstance(entry, list) and len(numbers) > max(length, 1):
        problem = f"{len(numbers)} numbers, but the response has {length} tokens"
    else:
        return [float(number) for number in numbers] if isinstance(entry, list) and length else float(sum(numbers))
    raise RewardError(f"{name} returned {problem}, for sample {index}: {short(sample)}")


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
