"""PPO towards positive film reviews, from a GPT-2 that has read IMDB; a sentiment classifier is the reward.

Usage: python -m examples.ppo_sentiments [--model tiny] [--data made] [--reward made] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.imdb import openings, questions, reviews, sentiment


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(trlx.load_preset("ppo"), hparams)
    return trlx.train(
        reward_fn=sentiment(reward),
        prompts=openings(reviews(data)),
        eval_prompts=questions(data, 256),
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
