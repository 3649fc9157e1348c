"""ILQL on all of IMDB: reviews of both kinds, the label as reward.

Usage: python -m examples.ilql_sentiments [--model tiny] [--data made] [--reward made] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.imdb import questions, reviews, sentiment_metric


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer. `reward` names what evaluations measure."""
    config = configure(trlx.load_preset("ilql"), hparams)
    rows = reviews(data)
    return trlx.train(
        samples=[row["text"] for row in rows],
        rewards=[row["label"] for row in rows],
        eval_prompts=questions(data, 256),
        metric_fn=sentiment_metric(reward),
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
