"""Checks what reward functions return, and sums it up into one score per sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trlx.rewards.alignment import Alignment
from trlx.rewards.calling import Arguments, RewardError, short
from trlx.rewards.weighted import Part

Score = float | list[float]
"""One number for a response, or one per response token (dense)."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What reward_fn says about one sample."""

    score: Score
    parts: dict[str, float] = field(default_factory=dict)
    """By name, the parts of the score, before weights and summed over tokens; empty if nothing has a name."""


def scored(parts: Sequence[Part], returned: Sequence[Any], asked: Arguments, alignment: Alignment) -> list[Scored]:
    """One `Scored` per rollout, from what each part returned. Dense scores of functions without output_ids are aligned.

    Raises a RewardError, which shows the sample, if a result has a wrong type or length, or is not finite.
    """
    columns = []
    for part, value in zip(parts, returned, strict=True):
        has_names = isinstance(value, Mapping)
        if has_names and not (value and all(map(str, value))):
            raise RewardError(f"{part.name} must return a dict of lists by name, got {repr(value)[:80]}")
        for key, one in value.items() if has_names else [("", value)]:
            name = "/".join(filter(None, (part.key, str(key))))
            where = f"{part.name}'s {str(key)!r}" if has_names else part.name
            align = None if "output_ids" in part.named else alignment
            columns.append((name, part.weight, _scores(where, one, asked, align)))
    names, weights, scores = zip(*columns, strict=True)
    for name in names:
        if name == "mean" or names.count(name) > 1:
            raise RewardError(f"No part of a reward can be called {name!r}: reward/{name} is another number. Rename it")
    return [
        Scored(
            _weighted_sum(weights, row, len(rollout.response)),
            {name: total(score) for name, score in zip(names, row, strict=True) if name},
        )
        for row, rollout in zip(zip(*scores, strict=True), asked.rollouts, strict=True)
    ]


def total(score: Score) -> float:
    """A score as one number: the sum of a dense one."""
    return sum(score) if isinstance(score, list) else score


def means(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By name, the mean over all samples that have a part of this name."""
    found: dict[str, list[float]] = {}
    for one in parts:
        for name, number in one.items():
            found.setdefault(name, []).append(number)
    return {name: sum(numbers) / len(numbers) for name, numbers in found.items()}


def entries(name: str, returned: Any, samples: Sequence[str]) -> list[Any]:
    """The entry of each sample, without arrays and tensors; a RewardError if there is not one per sample."""
    found, first = plain(returned), short(samples[0])
    if not isinstance(found, list):
        raise RewardError(f"{name} must return one entry per sample, got {repr(returned)[:80]}; first sample: {first}")
    if len(found) != len(samples):
        raise RewardError(f"{name} returned {len(found)} entries for {len(samples)} samples; first sample: {first}")
    return [[*map(plain, entry)] if isinstance(entry, list) else entry for entry in map(plain, found)]


def plain(value: Any) -> Any:
    """Arrays, tensors and tuples as lists, their scalars as numbers, anything else as it is."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def is_number(value: Any) -> bool:
    """Whether it is a plain number; True and False are."""
    return isinstance(value, (int, float))


def _scores(name: str, returned: Any, asked: Arguments, align: Alignment | None) -> list[Score]:
    """One score of finite numbers per sample. If all entries are lists of one number, the numbers are the scores."""
    rollouts, samples, scores = asked.rollouts, asked.offered["samples"], []
    found = entries(name, returned, samples)
    is_column = all(isinstance(entry, list) and len(entry) == 1 for entry in found)
    for index, (entry, rollout) in enumerate(zip(found, rollouts, strict=True)):
        numbers = entry if isinstance(entry, list) else [entry]
        if not all(map(is_number, numbers)) or (not numbers and rollout.response):
            problem = "which is neither a number nor a list of numbers"
            raise _wrong(name, f"{repr(entry)[:80]}, {problem}", index, samples)
        if not all(map(math.isfinite, numbers)):
            raise _wrong(name, f"{repr(entry)[:80]}, which is not finite", index, samples)
        is_dense = isinstance(entry, list) and rollout.response and not is_column
        scores.append([float(number) for number in numbers] if is_dense else float(sum(numbers)))
    if align is not None:
        scores = align(name, scores, [rollout.response for rollout in rollouts], asked.offered["outputs"])
    for index, (score, rollout) in enumerate(zip(scores, rollouts, strict=True)):
        if isinstance(score, list) and len(score) > len(rollout.response):
            tokens = f"the response has {len(rollout.response)} tokens (see output_ids)"
            raise _wrong(name, f"{len(score)} numbers, but {tokens}", index, samples)
    return scores


def _wrong(name: str, what: str, index: int, samples: Sequence[str]) -> RewardError:
    return RewardError(f"{name} returned {what}, for sample {index}: {short(samples[index])}")


def _weighted_sum(weights: Sequence[float], scores: Sequence[Score], length: int) -> Score:
    """A number if all scores are numbers; else `length` numbers, with the scores that are numbers at the last token."""
    if not any(isinstance(score, list) for score in scores):
        return sum(weight * score for weight, score in zip(weights, scores, strict=True))
    tokens = [0.0] * length
    for weight, score in zip(weights, scores, strict=True):
        for index, number in enumerate(score) if isinstance(score, list) else [(length - 1, score)]:
            tokens[index] += weight * number
    return tokens
