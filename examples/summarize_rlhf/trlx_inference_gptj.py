"""Step 4: how good a trained model's summaries are: ROUGE, and the reward beside the human's.

Usage: python -m examples.summarize_rlhf.trlx_inference_gptj [--model FOLDER] [--reward made] [--out FOLDER]
Needs for its metric: pip install evaluate rouge-score
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, pipeline

import trlx
from examples.common import arguments, configure
from examples.summarize_rlhf.task import CUE, posts, preference, rouge
from trlx.models.source import tokenizer_for

MODEL = "CarperAI/openai_summarize_tldr_ppo"


def summaries(config: trlx.TRLConfig, prompts: list[str], batch_size: int = 16) -> list[str]:
    """The likeliest continuation of each prompt."""
    source = config.model.model_path
    how = {"dtype": "auto"} if isinstance(source, str) else {}
    load = AutoModelForCausalLM.from_pretrained if isinstance(source, str) else AutoModelForCausalLM.from_config
    tokenizer = tokenizer_for(source, config.tokenizer)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    generate = pipeline("text-generation", model=load(source, **how), tokenizer=tokenizer, device=device)
    new_tokens = config.method.gen_kwargs["max_new_tokens"]
    found = generate(prompts, batch_size=batch_size, max_new_tokens=new_tokens, do_sample=False, return_full_text=False)
    return [candidates[0]["generated_text"] for candidates in found]


def main(hparams=None, data: str = "default", reward: str = "default") -> dict[str, float]:
    """Writes ``summaries.jsonl`` to train.checkpoint_dir; returns mean ROUGE and mean rewards."""
    base = trlx.load_preset("ppo").evolve(
        model={"model_path": MODEL},
        tokenizer={"tokenizer_path": "EleutherAI/gpt-j-6B"},
        method={"gen_kwargs": {"max_new_tokens": 50}},
    )
    config = configure(base, hparams)
    rows = posts(data, "test")
    judge = preference(reward)
    outputs, labels = summaries(config, [row["prompt"] for row in rows]), [row["label"] for row in rows]
    ours = judge(samples=[row["prompt"] + output for row, output in zip(rows, outputs, strict=True)])
    human = judge(samples=[row["prompt"] + row["label"] for row in rows])
    table = [
        {
            "post": row["prompt"].removesuffix(CUE),
            "pred": output,
            "truth": row["label"],
            "score_pred": a,
            "score_truth": b,
        }
        for row, output, a, b in zip(rows, outputs, ours, human, strict=True)
    ]
    out = Path(config.train.checkpoint_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summaries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    result = {name: _mean(value) for name, value in rouge(reward)(outputs=outputs, label=labels).items()}
    return result | {"score_pred": _mean(ours), "score_truth": _mean(human)}


def _mean(values) -> float:
    return sum(values) / len(values) if isinstance(values, list) else float(values)


if __name__ == "__main__":
    print(json.dumps(main(**arguments(__doc__)), indent=1))
