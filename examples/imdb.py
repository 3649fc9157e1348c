"""Film reviews of IMDB and a classifier's opinion on them: the task that many examples share."""

from __future__ import annotations

import random
from typing import Any

import trlx
from examples.common import RewardFn, Rows, hub_data, reward, rows, share_of_vowels

QUESTION = "I don't know much about Hungarian underground"


def reviews(data: str, split: str = "train+test") -> Rows:
    """Rows of ``text`` and ``label`` (1: positive)."""
    return rows(data, lambda: hub_data("imdb", split=split), _made)


def questions(data: str, count: int) -> list[str]:
    """One beginning `count` times, to see how differently a policy continues it; few where the data is small."""
    return [QUESTION] * (count if data == "default" else 4)


def openings(reviews: Rows, words: int = 4) -> list[str]:
    """The first words of each review, to go on from."""
    return [" ".join(row["text"].split()[:words]) for row in reviews]


def openings_of_many_lengths(reviews: Rows, least: int = 2, most: int = 7, seed: int = 2023) -> list[str]:
    """From `least` to `most` words of each review that has more than 200 characters."""
    draw = random.Random(seed)
    return [
        opening for row in reviews if len(row["text"]) > 200 for opening in openings([row], draw.randint(least, most))
    ]


def sentiment(source: str) -> RewardFn:
    """Probability that each sample is positive, as reward_fn."""
    return reward(
        source, lambda: trlx.SequenceClassifierReward("lvwerra/distilbert-imdb", label="POSITIVE"), share_of_vowels
    )


def sentiment_metric(source: str) -> Any:
    """The same as metric_fn."""
    judge = sentiment(source)
    return lambda samples, **kwargs: {"sentiments": judge(samples=samples)}


def _made() -> Rows:
    kinds = [("a lovely film, full of ideas and of joy", 1), ("a dull film that never ends", 0)]
    return [
        {"text": f"We saw {kind}, " * 6 + f"said viewer {i}.", "label": label}
        for i in range(8)
        for kind, label in kinds
    ]
