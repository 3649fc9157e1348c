"""PPO on summaries of news with Flan-T5, rewarded by METEOR against those of editors.

Usage: python -m examples.summarize_daily_cnn.t5_summarize_daily_cnn [--model tiny] [--data made] [--reward made] ...
Needs for its default reward: pip install evaluate nltk
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import trlx
from examples.common import Rows, arguments, configure, hub_data, overlap, rows
from examples.common import reward as chosen_reward

MODEL = "google/flan-t5-large"


def summary_config() -> trlx.TRLConfig:
    """Nucleus sampling for rollouts, plain sampling for evaluations."""
    return trlx.load_preset("ppo").evolve(
        model={"model_path": MODEL, "model_arch_type": "seq2seq", "num_layers_unfrozen": 2},
        optimizer={"kwargs": {"lr": 1.0e-5, "betas": [0.9, 0.999]}},
        scheduler={"kwargs": {"T_max": 10000, "eta_min": 1.0e-6}},
        method={
            "num_rollouts": 512,
            "chunk_size": 12,
            "init_kl_coef": 0.05,
            "target": 6,
            "gamma": 0.99,
            "gen_kwargs": {"max_new_tokens": 100},
            "gen_experience_kwargs": {"max_new_tokens": 100, "do_sample": True, "top_k": 50, "top_p": 0.95},
        },
        train={"seq_length": 612, "total_steps": 100000, "batch_size": 12, "eval_interval": 500},
    )


def articles(data: str, split: str, count: int) -> Rows:
    """Prompts, with the editor's summary beside them for the reward."""
    found = rows(data, lambda: islice(hub_data("cnn_dailymail", "3.0.0", split=split), count), _made)
    return [{"prompt": f"Summarize: {row['article']}", "original_summaries": row["highlights"]} for row in found]


def meteor() -> Any:
    """METEOR of each summary, as reward_fn."""
    import evaluate

    metric = evaluate.load("meteor")

    def reward_fn(outputs, original_summaries, **kwargs):
        pairs = zip(outputs, original_summaries, strict=True)
        return [metric.compute(predictions=[ours.strip()], references=[theirs])["meteor"] for ours, theirs in pairs]

    return reward_fn


def likeness(outputs, original_summaries, **kwargs):
    """The made reward: common words."""
    return [overlap(output, summary) for output, summary in zip(outputs, original_summaries, strict=True)]


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(summary_config(), hparams)
    return trlx.train(
        reward_fn=chosen_reward(reward, meteor, likeness),
        prompts=articles(data, "train", 20_000),
        eval_prompts=articles(data, "validation", 1000),
        config=config,
    )


def _made() -> Rows:
    return [{"article": f"Storm {i} came. It went.", "highlights": f"Storm {i} is over."} for i in range(8)]


if __name__ == "__main__":
    main(**arguments(__doc__))
