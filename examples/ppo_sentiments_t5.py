"""PPO towards positive film reviews with an encoder-decoder model, a T5 that has read IMDB.

Usage: python -m examples.ppo_sentiments_t5 [--model tiny] [--data made] [--reward made] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.imdb import openings_of_many_lengths, reviews, sentiment

MODEL = "lvwerra/t5-imdb"


def t5_config() -> trlx.TRLConfig:
    """Small batches, and a KL steered to 6 nats a response."""
    return trlx.load_preset("ppo").evolve(
        model={"model_path": MODEL, "model_arch_type": "seq2seq", "num_layers_unfrozen": -1},
        tokenizer={"padding_side": "right"},
        optimizer={"kwargs": {"lr": 5.0e-5, "betas": [0.9, 0.999]}},
        scheduler={"kwargs": {"T_max": 100000, "eta_min": 5.0e-5}},
        method={
            "chunk_size": 12,
            "init_kl_coef": 0.05,
            "target": 6,
            "gamma": 0.99,
            # -1 is no token: reviews go on to their full length
            "gen_kwargs": {"max_new_tokens": 50, "do_sample": True, "top_k": 0, "top_p": 1.0, "eos_token_id": -1},
        },
        train={"seq_length": 128, "total_steps": 100000, "batch_size": 12, "save_best": False},
    )


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(t5_config(), hparams)
    return trlx.train(
        reward_fn=sentiment(reward),
        prompts=openings_of_many_lengths(reviews(data, "train")),
        eval_prompts=openings_of_many_lengths(reviews(data, "test"))[:100],
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
