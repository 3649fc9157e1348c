"""Supervised fine-tuning of GPT-J on the instructions of Alpaca; evaluated by turning bad film reviews into good ones.

Usage: python -m examples.alpaca.sft_alpaca [--model tiny] [--data made] [--reward made] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import Rows, arguments, configure, hub_data, rows
from examples.imdb import reviews, sentiment

MODEL = "EleutherAI/gpt-j-6B"
ALONE = "Below is an instruction that describes a task."
WITH_INPUT = ALONE[:-1] + ", paired with an input that provides further context."
ASKED = " Write a response that appropriately completes the request."


def prompt(instruction: str, given: str = "") -> str:
    """An instruction as Alpaca's models read it, with or without an input."""
    parts = {"Instruction": instruction, "Input": given, "Response": ""}
    written = "".join(f"\n\n### {name}:\n{text}" for name, text in parts.items() if text or name == "Response")
    return (WITH_INPUT if given else ALONE) + ASKED + written


def alpaca_config() -> trlx.TRLConfig:
    """Longer answers, smaller batches and a smaller learning rate than the SFT preset."""
    return trlx.load_preset("sft").evolve(
        model={"model_path": MODEL},
        optimizer={"kwargs": {"lr": 2.0e-5}},
        scheduler={"kwargs": {"eta_min": 2.0e-5}},
        method={"gen_kwargs": {"max_new_tokens": 256}},
        train={"total_steps": 2400, "batch_size": 4},
    )


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains, writes ``hf_model`` under train.checkpoint_dir, returns the trainer. `reward` is measured only."""
    config = configure(alpaca_config(), hparams)
    lessons = rows(data, lambda: hub_data("tatsu-lab/alpaca", split="train"), _made)
    film_data = data if data == "default" else "made"
    bad = [row["text"][:1024] for row in reviews(film_data, "test") if row["label"] == 0][:256]
    judge = sentiment(reward)
    trainer = trlx.train(
        samples=[[prompt(row["instruction"], row.get("input", "")), row["output"]] for row in lessons],
        eval_prompts=[prompt("Rewrite the input into a positive review.", review) for review in bad],
        metric_fn=lambda outputs, **kwargs: {"sentiments": judge(samples=outputs)},
        config=config,
    )
    trainer.save_pretrained()
    return trainer


def _made() -> Rows:
    sums = [{"instruction": "Add the numbers.", "input": f"{i} and {i}", "output": str(2 * i)} for i in range(4)]
    return [*sums, {"instruction": "Say hello.", "input": "", "output": "Hello!"}] * 2


if __name__ == "__main__":
    main(**arguments(__doc__))
