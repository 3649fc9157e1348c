"""PPO on translation from English to German with T5, rewarded by COMET.

Usage: python -m examples.ppo_translation_t5 [--model tiny] [--data made] [--reward made] [section.key=value ...]
Needs for its default reward: pip install evaluate unbabel-comet sacrebleu
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import trlx
from examples.common import Rows, arguments, configure, hub_data, overlap, rows
from examples.common import reward as chosen_reward

MODEL = "t5-large"
TASK = "translate English to German: "


def translation_config() -> trlx.TRLConfig:
    """Rollouts are drawn from the likelier words; evaluations take the likeliest of four beams, as is usual here."""
    return trlx.load_preset("ppo").evolve(
        model={"model_path": MODEL, "model_arch_type": "seq2seq", "num_layers_unfrozen": -1},
        tokenizer={"padding_side": "right"},
        optimizer={"kwargs": {"lr": 2.0e-6, "betas": [0.9, 0.999]}},
        scheduler={"kwargs": {"T_max": 10000, "eta_min": 1.0e-6}},
        method={
            "num_rollouts": 256,
            "chunk_size": 12,
            "init_kl_coef": 0.05,
            "target": 6,
            "gamma": 0.99,
            "gen_kwargs": {"max_new_tokens": 100, "do_sample": False, "num_beams": 4},
            "gen_experience_kwargs": {"max_new_tokens": 100, "do_sample": True, "top_k": 50, "top_p": 0.95},
        },
        train={"seq_length": 612, "total_steps": 100000, "batch_size": 12, "eval_interval": 200},
    )


def pairs(data: str, split: str, count: int) -> Rows:
    """Prompts with the source and a human translation of it."""
    found = rows(data, lambda: _of_wmt(split, count), _made)
    return [{"prompt": TASK + row["en"], "source": row["en"], "reference": row["de"]} for row in found]


def comet() -> Any:
    """COMET's opinion on each translation."""
    import evaluate

    metric = evaluate.load("comet", "wmt20-comet-da", progress_bar=False)

    def reward_fn(outputs, source, reference, **kwargs):
        predictions = [output.strip() for output in outputs]
        return metric.compute(predictions=predictions, references=reference, sources=source)["scores"]

    return reward_fn


def corpus_metrics(judge: Any) -> Any:
    """The reward's mean with BLEU and chrF, which are of whole corpora, as metric_fn."""
    import evaluate

    bleu, chrf = evaluate.load("bleu"), evaluate.load("chrf")

    def metric_fn(outputs, reference, **kwargs):
        texts = {"predictions": [output.strip() for output in outputs], "references": [[text] for text in reference]}
        scores = judge(outputs=outputs, reference=reference, **kwargs)
        return {"comet": scores, "bleu": bleu.compute(**texts)["bleu"], "chrf": chrf.compute(**texts)["score"]}

    return metric_fn


def likeness(outputs, reference, **kwargs):
    """The made reward: common words."""
    return [overlap(output, text) for output, text in zip(outputs, reference, strict=True)]


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(translation_config(), hparams)
    judge = chosen_reward(reward, comet, likeness)
    return trlx.train(
        reward_fn=judge,
        metric_fn=corpus_metrics(judge) if reward == "default" else None,
        prompts=pairs(data, "train", 20_000),
        eval_prompts=pairs(data, "validation", 1000),
        config=config,
    )


def _of_wmt(split: str, count: int):
    stream = hub_data("wmt16", "de-en", split=split, streaming=True)
    return (row["translation"] for row in islice(stream, count))


def _made() -> Rows:
    return [{"en": "The house is red.", "de": "Das Haus ist rot."}, {"en": "I sleep.", "de": "Ich schlafe."}] * 4


if __name__ == "__main__":
    main(**arguments(__doc__))
