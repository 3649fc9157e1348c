"""Supervised fine-tuning on the positive reviews of IMDB, on tensor and pipeline parallelism.

Usage: torchrun --nproc-per-node 8 -m examples.nemo_sft_sentiments --model FOLDER [--preset megatron_20b] [--tp 4]
       python -m examples.nemo_sft_sentiments --model tiny [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.imdb import questions, reviews, sentiment_metric
from examples.megatron import nemo_arguments, nemo_config


def main(hparams=None, data: str = "default", reward: str = "default", preset: str = "megatron_1.3b"):
    """Trains, writes ``hf_model`` under train.checkpoint_dir, returns the trainer. `reward` is measured only."""
    config = nemo_config("sft", preset, hparams)
    trainer = trlx.train(
        samples=[row["text"] for row in reviews(data) if row["label"] == 1],
        eval_prompts=questions(data, 64),
        metric_fn=sentiment_metric(reward),
        config=config,
    )
    trainer.save_pretrained()
    return trainer


if __name__ == "__main__":
    main(**nemo_arguments(__doc__))
