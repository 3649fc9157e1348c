"""Instead of steps 2 and 3: ILQL on the comparisons themselves, with Flan-T5 XL.

Usage: torchrun --nproc-per-node 7 -m examples.summarize_rlhf.ilql_summarize_t5 [section.key=value ...]
       python -m examples.summarize_rlhf.ilql_summarize_t5 --model tiny
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.summarize_rlhf.task import CUE, MAX_LENGTH, comparisons, posts, preference

MODEL = "pvduy/flant5-xl_openai_tldr_sft"


def ilql_config() -> trlx.TRLConfig:
    """Small steps, and an evaluation with three strengths of the shift towards Q."""
    return trlx.load_preset("ilql").evolve(
        model={"model_path": MODEL, "model_arch_type": "seq2seq"},
        tokenizer={"truncation_side": "left"},
        optimizer={"kwargs": {"lr": 1.0e-6}},
        scheduler={"kwargs": {"T_max": 5000, "eta_min": 1.0e-6}},
        method={
            "tau": 0.6,
            "alpha": 0.0001,
            "steps_for_target_q_sync": 1,
            "gen_kwargs": {"max_new_tokens": 50, "top_k": 50, "beta": [1, 2, 3]},
        },
        train={
            "seq_length": MAX_LENGTH,
            "batch_size": 8,
            "total_steps": 5000,
            "keep_checkpoints": 3,
            "eval_interval": 1000,
            "checkpoint_dir": "ilql_summarize_t5",
        },
    )


def dialogue(row, answer: str):
    """A post and one of its summaries, without the cue that data repeats in front of it."""
    post = row["prompt"].removesuffix(CUE).rstrip()
    return [f"{post} {CUE}", row[answer].removeprefix(CUE)]


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer. `reward` is measured only."""
    config = configure(ilql_config(), hparams)
    pairs = comparisons(data, "train")
    judge = preference(reward)
    return trlx.train(
        samples=[dialogue(row, answer) for row in pairs for answer in ("chosen", "rejected")],
        rewards=[1.0, -1.0] * len(pairs),
        eval_prompts=[row["prompt"] for row in posts(data, "valid", 1000)],
        metric_fn=lambda samples, **kwargs: {"rewards": judge(samples=samples)},
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
