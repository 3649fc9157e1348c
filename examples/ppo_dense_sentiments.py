"""Dense rewards: a review should begin badly and end well, and each half is rewarded where it ends.

Usage: python -m examples.ppo_dense_sentiments [--model tiny] [--data made] [--reward made] [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Callable

import trlx
from examples.common import arguments, configure
from examples.imdb import openings, questions, reviews, sentiment


def halves(sample: str) -> tuple[str, str]:
    """The first half of a text's sentences, and the rest."""
    sentences = sample.split(".")
    middle = len(sentences) // 2
    return ".".join(sentences[:middle]), ".".join(sentences[middle:])


def dense(judge: Callable[..., list[float]]) -> Callable[..., list[list[float]]]:
    """A reward_fn that returns one number per response token, made of one that judges whole texts."""

    def reward_fn(samples, output_ids, **kwargs):
        first, second = zip(*map(halves, samples), strict=True)
        gloom = [1 - positive for positive in judge(samples=list(first))]
        joy = judge(samples=list(second))
        return [place(len(ids), *pair) for ids, *pair in zip(output_ids, gloom, joy, strict=True)]

    return reward_fn


def place(length: int, middle: float, end: float) -> list[float]:
    """Zeros but for the token in the middle of a response of `length` tokens and its last one."""
    scores = [0.0] * length
    scores[length // 2] = middle
    scores[-1] = end
    return scores


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(trlx.load_preset("ppo"), hparams)
    return trlx.train(
        reward_fn=dense(sentiment(reward)),
        prompts=openings(reviews(data)),
        eval_prompts=questions(data, 256),
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
