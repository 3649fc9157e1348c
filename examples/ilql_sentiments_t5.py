"""ILQL on IMDB with an encoder-decoder model.

Usage: python -m examples.ilql_sentiments_t5 [--model tiny] [--data made] [--reward made] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.imdb import openings_of_many_lengths, reviews, sentiment_metric

MODEL = "lvwerra/t5-imdb"


def t5_config() -> trlx.TRLConfig:
    """The ILQL preset for T5, with a strong shift towards Q when sampling."""
    return trlx.load_preset("ilql").evolve(
        model={"model_path": MODEL, "model_arch_type": "seq2seq"},
        tokenizer={"padding_side": "right"},
        optimizer={"kwargs": {"betas": [0.9, 0.999]}},
        scheduler={"kwargs": {"T_max": 100000}},
        method={"gen_kwargs": {"beta": 4}},
        train={"seq_length": 128, "batch_size": 32, "save_best": False},
    )


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer. `reward` names what evaluations measure."""
    config = configure(t5_config(), hparams)
    rows = reviews(data, "train")
    # the encoder reads the opening, the decoder writes the rest
    split = [row["text"].split(" ", 4) for row in rows]
    return trlx.train(
        samples=[[" ".join(words[:4]), words[-1]] for words in split],
        rewards=[row["label"] for row in rows],
        eval_prompts=openings_of_many_lengths(reviews(data, "test"))[:100],
        metric_fn=sentiment_metric(reward),
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
