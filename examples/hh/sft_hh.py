"""Supervised fine-tuning on the chosen answers of helpful and harmless dialogues.

Usage: torchrun --nproc-per-node 7 -m examples.hh.sft_hh [section.key=value ...]
       python -m examples.hh.sft_hh --model tiny
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.hh.task import GPTJ, STOP, comparisons, helpfulness, with_chosen


def sft_config() -> trlx.TRLConfig:
    """GPT-J, all of it."""
    return trlx.load_preset("sft").evolve(
        model={"model_path": GPTJ},
        tokenizer={"truncation_side": "left"},
        optimizer={"kwargs": {"lr": 1.0e-6}},
        scheduler={"kwargs": {"T_max": 100000000, "eta_min": 1.0e-6}},
        method={"gen_kwargs": {"max_new_tokens": 128, "top_k": 20}},
        train={
            "total_steps": 10000,
            "batch_size": 4,
            "eval_interval": 1000,
            "checkpoint_dir": "checkpoints/sft_hh",
        },
    )


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer. `reward` is measured only."""
    config = configure(sft_config(), hparams)
    judge = helpfulness(reward)
    return trlx.train(
        samples=[row["prompt"] + row["chosen"] for row in comparisons(data, "train", "Dahoas/full-hh-rlhf")],
        eval_prompts=with_chosen(comparisons(data, "test", "Dahoas/full-hh-rlhf"), 280),
        metric_fn=lambda **given: {"reward": judge(**given)},
        config=config,
        stop_sequences=STOP,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
