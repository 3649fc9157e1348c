"""Step 1: GPT-J learns to summarize posts as people do.

Usage: torchrun --nproc-per-node 8 -m examples.summarize_rlhf.sft [section.key=value ...]
       python -m examples.summarize_rlhf.sft --model tiny
Needs for its metric: pip install evaluate rouge-score
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.summarize_rlhf.task import MAX_LENGTH, posts, rouge

MODEL = "EleutherAI/gpt-j-6B"


def sft_config() -> trlx.TRLConfig:
    """Five passes over the posts in half precision."""
    return trlx.load_preset("sft").evolve(
        model={"model_path": MODEL},
        optimizer={"kwargs": {"lr": 1.0e-5}},
        scheduler={"kwargs": {"eta_min": 1.0e-5}},
        method={"gen_kwargs": {"max_new_tokens": 50}},
        train={
            "seq_length": MAX_LENGTH,
            "epochs": 5,
            "total_steps": 100000,
            "batch_size": 16,
            "eval_interval": 500,
            "keep_checkpoints": 3,
            "gradient_checkpointing": True,
            "checkpoint_dir": "gptj-supervised-summarize-checkpoint",
        },
    )


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains, writes ``hf_model`` under train.checkpoint_dir, returns the trainer. `reward` chooses the metric."""
    config = configure(sft_config(), hparams)
    trainer = trlx.train(
        samples=[row["prompt"] + row["label"] for row in posts(data, "train")],
        eval_prompts=posts(data, "valid", 2000),
        metric_fn=rouge(reward),
        config=config,
    )
    trainer.save_pretrained()
    return trainer


if __name__ == "__main__":
    main(**arguments(__doc__))
