"""The task of ppo_sentiments.py with Llama 2 of 7 billion parameters, its top two blocks trained.

Usage: torchrun --nproc-per-node 4 -m examples.ppo_sentiments_llama [--model NAME] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.imdb import openings, questions, reviews, sentiment

MODEL = "NousResearch/Llama-2-7b-hf"


def llama_config() -> trlx.TRLConfig:
    """The PPO preset with a steered KL and a smaller learning rate."""
    return trlx.load_preset("ppo").evolve(
        model={"model_path": MODEL, "num_layers_unfrozen": 2},
        optimizer={"kwargs": {"lr": 1.0e-5}},
        scheduler={"kwargs": {"T_max": 10000, "eta_min": 1.0e-5}},
        method={"init_kl_coef": 0.001, "target": 6},
        train={"total_steps": 400, "save_best": False},
    )


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(llama_config(), hparams)
    return trlx.train(
        reward_fn=sentiment(reward),
        prompts=openings(reviews(data)),
        eval_prompts=questions(data, 64),
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
