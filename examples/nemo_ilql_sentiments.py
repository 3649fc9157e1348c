"""ILQL on all of IMDB on tensor and pipeline parallelism: reviews of both kinds, the label as reward.

Usage: torchrun --nproc-per-node 8 -m examples.nemo_ilql_sentiments --model FOLDER [--preset megatron_20b] [--tp 4]
       python -m examples.nemo_ilql_sentiments --model tiny [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.imdb import questions, reviews, sentiment_metric
from examples.megatron import nemo_arguments, nemo_config


def main(hparams=None, data: str = "default", reward: str = "default", preset: str = "megatron_1.3b"):
    """Trains; returns the trainer. `reward` names what evaluations measure."""
    config = nemo_config("ilql", preset, hparams)
    rows = reviews(data)
    return trlx.train(
        samples=[row["text"] for row in rows],
        rewards=[row["label"] for row in rows],
        eval_prompts=questions(data, 256),
        metric_fn=sentiment_metric(reward),
        config=config,
    )


if __name__ == "__main__":
    main(**nemo_arguments(__doc__))
