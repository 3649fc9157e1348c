"""Supervised fine-tuning of GPT-2 on the positive reviews of IMDB.

Usage: python -m examples.sft_sentiments [--model tiny] [--data made] [--reward made] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.imdb import questions, reviews, sentiment_metric


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains, writes ``hf_model`` under train.checkpoint_dir, returns the trainer. `reward` is measured only."""
    config = configure(trlx.load_preset("sft"), hparams)
    trainer = trlx.train(
        samples=[row["text"] for row in reviews(data) if row["label"] == 1],
        eval_prompts=questions(data, 64),
        metric_fn=sentiment_metric(reward),
        config=config,
    )
    trainer.save_pretrained()
    return trainer


if __name__ == "__main__":
    main(**arguments(__doc__))
