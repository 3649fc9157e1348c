"""Dense rewards: a review should begin badly and end well, and each half is rewarded where it ends.

Usage: python -m examples.ppo_dense_sentiments [--model tiny] [--data made] [--reward made] [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Callable

import trlx
from examples.common import arguments, configure
from examples.imdb import openings, questions, reviews, sentiment

UNREADABLE = "\N{REPLACEMENT CHARACTER}"


def halves(sample: str) -> tuple[str, str]:
    """The first half of a text's sentences, and the rest."""
    sentences = sample.split(".")
    middle = len(sentences) // 2
    return ".".join(sentences[:middle]), ".".join(sentences[middle:])


def dense(judge: Callable[..., list[float]]) -> Callable[..., list[list[float]]]:
    """A reward_fn that returns one number per response token, made of one that judges whole texts."""

    def reward_fn(samples, outputs, tokenizer, **kwargs):
        first, second = zip(*map(halves, samples), strict=True)
        gloom = [1 - positive for positive in judge(samples=list(first))]
        joy = judge(samples=list(second))
        return [place(output, tokenizer, *pair) for output, *pair in zip(outputs, gloom, joy, strict=True)]

    return reward_fn


def place(output: str, tokenizer, middle: float, end: float) -> list[float]:
    """Zeros but for the token in the middle of an output and its last one."""
    # half a character is one sampled token, but three where its replacement is tokenized again
    length = len(tokenizer(output.replace(UNREADABLE, ""), add_special_tokens=False)["input_ids"])
    scores = [0.0] * max(length, 1)
    scores[length // 2] = middle
    scores[-1] = end
    return scores


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    return trlx.train(
        reward_fn=dense(sentiment(reward)),
        prompts=openings(reviews(data)),
        eval_prompts=questions(data, 256),
        config=configure(trlx.load_preset("ppo"), hparams),
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
