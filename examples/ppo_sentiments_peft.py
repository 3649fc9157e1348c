"""The task of ppo_sentiments.py with LoRA: only adapters train, and the reference is the model without them.

Usage: python -m examples.ppo_sentiments_peft [--model tiny] [--data made] [--reward made] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.imdb import openings, questions, reviews, sentiment

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1}


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    base = trlx.load_preset("ppo").evolve(model={"peft_config": LORA, "num_layers_unfrozen": -1})
    config = configure(base, hparams)
    return trlx.train(
        reward_fn=sentiment(reward),
        prompts=openings(reviews(data)),
        eval_prompts=questions(data, 256),
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
