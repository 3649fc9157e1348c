"""Rejection fine-tuning towards positive film reviews: imitate the best tenth of one's own samples.

Usage: python -m examples.rft_sentiments [--model tiny] [--data made] [--reward made] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.imdb import openings, questions, reviews, sentiment


def rft_config() -> trlx.TRLConfig:
    """New samples at every epoch, the best 10 % of them kept."""
    return trlx.load_preset("rft").evolve(
        method={"n_generations_per_prompt": 4, "start_percentile": 0.9, "end_percentile": 0.95, "n_improve_steps": 1}
    )


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(rft_config(), hparams)
    return trlx.train(
        reward_fn=sentiment(reward),
        prompts=openings(reviews(data, "train[:512]")),
        eval_prompts=questions(data, 256),
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
