"""Step 2: a reward model from comparisons, with the Trainer of transformers.

Usage: torchrun --nproc-per-node 8 -m examples.summarize_rlhf.reward_model [--model FOLDER] [--data FILE] [--out FOLDER]
       python -m examples.summarize_rlhf.reward_model --model tiny --data made max_steps=2

Trailing ``name=value`` are TrainingArguments of transformers. What it writes to --out is a sequence classifier with one
label, for trlx.SequenceClassifierReward.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from examples.common import Rows, byte_tokenizer, tiny_gpt2
from examples.summarize_rlhf.task import MAX_LENGTH, SFT, comparisons

FROZEN = 0.7
"""Share of the blocks, from the bottom, that keep their weights."""
MIN_WORDS = 5


class PairwiseTrainer(Trainer):
    """L = -log sigmoid(r(chosen) - r(rejected)), eq. 1 of arXiv:2009.01325; rows come as [chosen ..., rejected ...]."""

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs):
        scores = model(**inputs).logits[:, 0].float()
        chosen, rejected = scores.chunk(2)
        loss = -logsigmoid(chosen - rejected).mean()
        return (loss, {"logits": chosen - rejected}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.inference_mode():
            inputs = self._prepare_inputs(inputs)
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs["logits"], torch.ones_like(outputs["logits"])


def pairs(rows: Rows, min_words: int = MIN_WORDS) -> Rows:
    """Two texts each that differ, both long enough to say something."""
    return [
        {name: f"{row['prompt']}\n{row[name]}" for name in ("chosen", "rejected")}
        for row in rows
        if row["chosen"] != row["rejected"] and min(len(row[n].split()) for n in ("chosen", "rejected")) >= min_words
    ]


def collator(tokenizer) -> Any:
    """Pairs as one batch of twice as many rows, each between the words that GPT-J's summaries stand between."""

    def collate(pairs: Rows) -> dict[str, torch.Tensor]:
        texts = [f"<|startoftext|>{pair[name]}<|endoftext|>" for name in ("chosen", "rejected") for pair in pairs]
        return dict(tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"))

    return collate


def freeze_bottom(model, share: float = FROZEN) -> None:
    """Stops the lower `share` of the blocks from training."""
    blocks = model.transformer.h
    for block in blocks[: int(share * len(blocks))]:
        block.requires_grad_(False)


def load(name: str):
    """(classifier with one label, tokenizer)."""
    if name == "tiny":
        tokenizer = byte_tokenizer()
        config = tiny_gpt2(tokenizer)
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def main(hparams=None, model: str = SFT, data: str = "default", out: str = "rm_checkpoint"):
    """Trains; returns the Trainer. `hparams` are TrainingArguments."""
    classifier, tokenizer = load(model)
    freeze_bottom(classifier)
    settings = {
        "num_train_epochs": 5,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1.0e-5,
        "warmup_steps": 100,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_steps": 500,
        "save_total_limit": 1,
        "bf16": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "report_to": "none",
        "output_dir": out,
    }
    min_words = MIN_WORDS if data == "default" else 1
    trainer = PairwiseTrainer(
        model=classifier,
        args=TrainingArguments(**(settings | dict(hparams or {}))),
        train_dataset=pairs(comparisons(data, "train"), min_words),
        eval_dataset=pairs(comparisons(data, "test"), min_words),
        data_collator=collator(tokenizer),
        compute_metrics=lambda result: {"accuracy": float((result.predictions > 0).mean())},
    )
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(out)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SFT, help='hub name or folder, or "tiny"')
    parser.add_argument("--data", default="default", help='"made", or a file of JSON lines')
    parser.add_argument("--out", default="rm_checkpoint")
    parser.add_argument("arguments", nargs="*", metavar="name=value")
    args = parser.parse_intermixed_args()
    main(OmegaConf.to_container(OmegaConf.from_dotlist(args.arguments)), args.model, args.data, args.out)
