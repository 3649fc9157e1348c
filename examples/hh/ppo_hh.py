"""PPO on helpful and harmless dialogues.

Usage: CONFIG_NAME=1B torchrun --nproc-per-node 7 -m examples.hh.ppo_hh [section.key=value ...]
       python -m examples.hh.ppo_hh --model tiny
Sizes: 125M, 1B, 6B, 20B; without CONFIG_NAME GPT-J. One GPU is left for the reward model; or see serve_reward.py.
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.hh.task import GPTJ, STOP, comparisons, helpfulness, with_chosen, with_size

SIZES = {
    "125M": {
        "model": {"model_path": "Dahoas/pythia-125M-static-sft"},
        "method": {"num_rollouts": 128},
        "train": {"batch_size": 32, "total_steps": 1500},
    },
    "1B": {
        "model": {"model_path": "Dahoas/pythia-1B-static-sft"},
        "optimizer": {"kwargs": {"lr": 6.0e-6}},
        "scheduler": {"kwargs": {"eta_min": 6.0e-6}},
        "train": {"batch_size": 8, "total_steps": 2500},
    },
    "6B": {
        "model": {"model_path": "Dahoas/pythia-6B-static-sft"},
        "train": {"seq_length": 512, "total_steps": 6000},
    },
    "20B": {
        "model": {"model_path": "EleutherAI/gpt-neox-20b"},
        "optimizer": {"kwargs": {"lr": 1.0e-6}},
        "scheduler": {"kwargs": {"eta_min": 1.0e-6}},
        "method": {"num_rollouts": 16, "chunk_size": 4, "ppo_epochs": 2},
        "train": {"seq_length": 512, "batch_size": 1, "total_steps": 8000},
    },
}


def ppo_config() -> trlx.TRLConfig:
    """GPT-J with two blocks trained, or the size that CONFIG_NAME says."""
    config = trlx.load_preset("ppo").evolve(
        model={"model_path": GPTJ, "num_layers_unfrozen": 2},
        tokenizer={"truncation_side": "left"},
        optimizer={"kwargs": {"lr": 8.0e-6}},
        scheduler={"kwargs": {"T_max": 10000, "eta_min": 8.0e-6}},
        method={
            "num_rollouts": 64,
            "chunk_size": 16,
            "init_kl_coef": 0.05,
            "target": 6,
            "scale_reward": "running",
            "gen_kwargs": {"max_new_tokens": 128},
        },
        train={"epochs": 10000, "batch_size": 4, "eval_interval": 500, "checkpoint_dir": "checkpoints/ppo_hh"},
    )
    return with_size(config, SIZES)


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(ppo_config(), hparams)
    return trlx.train(
        reward_fn=helpfulness(reward),
        prompts=with_chosen(comparisons(data, "train", "Dahoas/rm-static")),
        eval_prompts=with_chosen(comparisons(data, "test", "Dahoas/rm-static"), 280),
        config=config,
        stop_sequences=STOP,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
