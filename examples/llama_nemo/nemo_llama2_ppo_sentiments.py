"""PPO of Llama 2 7B towards positive film reviews, every layer shared by four GPUs.

Usage: torchrun --nproc-per-node 8 -m examples.llama_nemo.nemo_llama2_ppo_sentiments --tp 4 --sp
       python -m examples.llama_nemo.nemo_llama2_ppo_sentiments --model tiny
"""

from __future__ import annotations

import trlx
from examples.common import configure
from examples.imdb import openings, questions, reviews, sentiment
from examples.megatron import layout_arguments

LLAMA = "meta-llama/Llama-2-7b-hf"


def llama_config() -> trlx.TRLConfig:
    """All weights train slowly, in bf16; activations are computed again, so that long rollouts fit."""
    return trlx.load_preset("ppo").evolve(
        model={"model_path": LLAMA, "num_layers_unfrozen": -1},
        tokenizer={"truncation_side": "right"},
        optimizer={"name": "distributed_fused_adam", "kwargs": {"lr": 1.0e-6, "weight_decay": 1.0e-6}},
        scheduler={"kwargs": {"T_max": 1600, "eta_min": 1.0e-7}},
        method={"num_rollouts": 128, "chunk_size": 64, "init_kl_coef": 0.001},
        train={
            "trainer": "NeMoPPOTrainer",
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "total_steps": 1600,
            "batch_size": 16,
            "minibatch_size": 2,
            "checkpoint_dir": "ckpts/nemo_llama2_ppo_sentiments",
        },
    )


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(llama_config(), hparams)
    return trlx.train(
        reward_fn=sentiment(reward),
        prompts=openings(reviews(data)),
        eval_prompts=questions(data, 256),
        config=config,
    )


if __name__ == "__main__":
    main(**layout_arguments(__doc__))
