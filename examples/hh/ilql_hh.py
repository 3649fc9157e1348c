"""ILQL on helpful and harmless dialogues: the chosen answer is worth 1, the rejected one -1.

Usage: CONFIG_NAME=1B torchrun --nproc-per-node 7 -m examples.hh.ilql_hh [section.key=value ...]
       python -m examples.hh.ilql_hh --model tiny
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.hh.task import GPTJ, STOP, comparisons, helpfulness, with_chosen, with_size

SIZES = {
    "125M": {"model": {"model_path": "EleutherAI/pythia-125m-deduped"}, "train": {"batch_size": 16}},
    "1B": {"model": {"model_path": "EleutherAI/pythia-1.4b-deduped"}, "train": {"batch_size": 8}},
    "6B": {"model": {"model_path": "EleutherAI/pythia-6.9b-deduped"}},
    "20B": {"model": {"model_path": "EleutherAI/gpt-neox-20b"}, "train": {"batch_size": 1, "total_steps": 3000}},
}


def ilql_config() -> trlx.TRLConfig:
    """GPT-J, or the size that CONFIG_NAME says; evaluated with two strengths of the shift towards Q."""
    config = trlx.load_preset("ilql").evolve(
        model={"model_path": GPTJ},
        tokenizer={"truncation_side": "left"},
        optimizer={"kwargs": {"lr": 1.0e-6}},
        scheduler={"kwargs": {"T_max": 1000000000, "eta_min": 1.0e-6}},
        method={
            "tau": 0.6,
            "alpha": 0.0001,
            "steps_for_target_q_sync": 1,
            "gen_kwargs": {"max_new_tokens": 128, "top_k": 20, "beta": [1, 4]},
        },
        train={
            "seq_length": 1024,
            "batch_size": 4,
            "total_steps": 20000,
            "keep_checkpoints": 3,
            "eval_interval": 1000,
            "checkpoint_dir": "checkpoints/ilql_hh",
        },
    )
    return with_size(config, SIZES)


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer. `reward` is measured only."""
    config = configure(ilql_config(), hparams)
    pairs = comparisons(data, "train", "Dahoas/full-hh-rlhf")
    judge = helpfulness(reward)
    return trlx.train(
        samples=[[row["prompt"], row[answer]] for row in pairs for answer in ("chosen", "rejected")],
        rewards=[1.0, -1.0] * len(pairs),
        eval_prompts=with_chosen(comparisons(data, "test", "Dahoas/full-hh-rlhf"), 280),
        metric_fn=lambda **given: {"reward": judge(**given)},
        config=config,
        stop_sequences=STOP,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
