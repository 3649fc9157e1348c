"""Teaches a small random GPT-2 to imitate random walks: the model that PPO, ILQL and RFT start from.

Usage: python -m examples.randomwalks.sft_randomwalks [--out FOLDER] [--total-steps N] [--seed N]
       torchrun --nproc-per-node 4 -m examples.randomwalks.sft_randomwalks --backend megatron --tp 2 --pp 2
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GPT2Config

import trlx
from examples.megatron import add_backend, backend
from examples.randomwalks.task import RandomWalks
from examples.randomwalks.tokenizer import letter_tokenizer

PRETRAINED = Path("ckpts/randomwalks/pretrained")
"""Where the model is written, and where the presets of this task look for it."""
EVAL_SAMPLES = 5
"""Samples per start letter at an evaluation."""


def pretrain(
    out: Path = PRETRAINED, total_steps: int = 200, seed: int = 1000, hparams: Mapping[str, Any] | None = None
) -> Path:
    """Writes model and tokenizer to `out`, a valid model_path; its metrics lie in ``<out>/sft``."""
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PRETRAINED)
    parser.add_argument("--total-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1000)
    add_backend(parser)
    args = parser.parse_args()
    pretrain(args.out, args.total_steps, args.seed, backend(args, "SFT"))
