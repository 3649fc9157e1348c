"""Samples film reviews from a model that PPO (or SFT) trained, in any layout, with a sentiment classifier's opinion.

Usage: torchrun --nproc-per-node 4 -m examples.nemo_ppo_inference --model ckpts/best_checkpoint --tp 2 --pp 2
       python -m examples.nemo_ppo_inference --model tiny
"""

from __future__ import annotations

from examples.imdb import openings, reviews, sentiment
from examples.megatron import inference_config, layout_arguments, speak
from trlx.trainer.nemo import NeMoSFTTrainer

PROMPTS = 8


def main(hparams=None, data: str = "default", reward: str = "default") -> list[str]:
    """Prints a sample from each prompt; returns them. To sample, the policy is all that is needed: no value head."""
    config = inference_config("sft", hparams)
    trainer = NeMoSFTTrainer(config, **config.train.trainer_kwargs)
    return speak(trainer, openings(reviews(data, "test"))[:PROMPTS], sentiment(reward))


if __name__ == "__main__":
    main(**layout_arguments(__doc__))
