"""PPO towards positive film reviews on tensor and pipeline parallelism; a sentiment classifier is the reward.

Usage: torchrun --nproc-per-node 8 -m examples.nemo_ppo_sentiments --model FOLDER [--preset megatron_20b] [--tp 4]
       python -m examples.nemo_ppo_sentiments --model tiny [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.imdb import openings, questions, reviews, sentiment
from examples.megatron import nemo_arguments, nemo_config


def main(hparams=None, data: str = "default", reward: str = "default", preset: str = "megatron_1.3b"):
    """Trains; returns the trainer."""
    config = nemo_config("ppo", preset, hparams)
    return trlx.train(
        reward_fn=sentiment(reward),
        prompts=openings(reviews(data)),
        eval_prompts=questions(data, 256),
        config=config,
    )


if __name__ == "__main__":
    main(**nemo_arguments(__doc__))
