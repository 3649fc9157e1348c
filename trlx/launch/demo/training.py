"""Training on random walks: a small model that imitates them, and what makes it walk shorter ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GPT2Config

import trlx
from trlx.launch.demo.task import RandomWalks
from trlx.launch.demo.tokenizer import letter_tokenizer

PRETRAINED = Path("ckpts/randomwalks/pretrained")
"""Where the model is written, and where the presets of this task look for it."""
EVAL_SAMPLES = 5
"""Samples per start letter at an evaluation."""


def pretrain(
    out: Path = PRETRAINED, total_steps: int = 200, seed: int = 1000, hparams: Mapping[str, Any] | None = None
) -> Path:
    """Teaches a small random GPT-2 to imitate walks. Writes model and tokenizer to `out`, a valid model_path; its
    metrics lie in ``<out>/sft``."""
    task = RandomWalks()
    tokenizer = letter_tokenizer(task.letters)
    config = trlx.load_preset("sft").evolve(
        train={
            "seq_length": task.max_length + 1,  # and eos
            "epochs": total_steps,  # more than enough
            "total_steps": total_steps,
            "batch_size": 32,
            "eval_interval": 20,
            "tracker": None,
            "checkpoint_dir": str(out / "sft"),
            "save_optimizer": False,
            "seed": seed,
        },
        tokenizer={"tokenizer_path": tokenizer},
        optimizer={"kwargs": {"lr": 1.0e-3}},
        scheduler={"kwargs": {"T_max": total_steps, "eta_min": 1.0e-4}},
        method={"gen_kwargs": {"max_new_tokens": task.max_length - 1}},
    )
    trainer = trlx.train(
        model_path=small_gpt2(tokenizer),
        samples=[[walk[0], walk[1:]] for walk in task.walks],
        eval_prompts=task.prompts * EVAL_SAMPLES,
        metric_fn=task.metric_fn,
        config=trlx.TRLConfig.update(config, hparams or {}),
    )
    trainer.save_pretrained(out)
    return out


def learn_online(config: trlx.TRLConfig) -> Any:
    """Trains the model of a config on its own walks, rewarded for short ones; returns the trainer."""
    task = RandomWalks()
    return trlx.train(
        reward_fn=task.reward_fn,
        prompts=task.prompts,
        eval_prompts=task.prompts * EVAL_SAMPLES,
        metric_fn=task.metric_fn,
        config=config,
    )


def learn_offline(config: trlx.TRLConfig, hparams: Mapping[str, Any] | None = None) -> Any:
    """Trains a small random GPT-2 with ILQL on walks of all qualities; returns the trainer.

    Args:
        hparams: settings over those of `config` and of this task.
    """
    task = RandomWalks()
    tokenizer = letter_tokenizer(task.letters)
    config = config.evolve(
        model={"model_path": small_gpt2(tokenizer)},
        tokenizer={"tokenizer_path": tokenizer},
        train={"trainer_kwargs": {"logit_mask": task.forbidden(len(tokenizer), tokenizer.eos_token_id)}},
    )
    return trlx.train(
        samples=[[walk[0], walk[1:]] for walk in task.walks],
        rewards=task.optimality(task.walks),
        eval_prompts=task.prompts * EVAL_SAMPLES,
        metric_fn=task.metric_fn,
        config=trlx.TRLConfig.update(config, hparams or {}),
    )


def small_gpt2(tokenizer) -> GPT2Config:
    """1.5 million weights. Without dropout: PPO switches it off anyway."""
    return GPT2Config(
        n_layer=6,
        n_embd=144,
        n_head=12,
        n_positions=32,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
