"""How fast PPO of a chat model of a given size is: random weights, long answers, a reward model that costs as one does.

Usage: torchrun --nproc-per-node 8 -m examples.nemo_vs_ds_chat --preset megatron_1.3b [--tp 4] [section.key=value ...]
       python -m examples.nemo_vs_ds_chat --model tiny

It prints the seconds of each phase and the tokens of answers per second, as medians over the run without its first
iteration. The tokenizer is GPT-2's; the model learns nothing, as every reward is 0.5.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModel, OPTConfig

import trlx
from examples.common import configure
from examples.common import reward as chosen_reward
from examples.hh.task import comparisons, with_chosen
from examples.megatron import nemo_arguments

PHASES = (
    "time/rollout_time",
    "time/rollout_generate",
    "time/rollout_score",
    "time/forward",
    "time/backward",
    "time/step",
)
ANSWER = 256
"""Tokens of an answer; no eos ends it, so that all sizes do the same work."""


def speed_config(preset: str, hparams: dict[str, Any] | None) -> trlx.TRLConfig:
    """A preset's sizes and layout with random weights."""
    base = trlx.load_preset("ppo", preset).evolve(
        model={"model_path": "random", "num_layers_unfrozen": -1},
        tokenizer={"tokenizer_path": "gpt2"},
        method={"num_rollouts": 256, "chunk_size": 64, "ppo_epochs": 1, "gen_kwargs": {"max_new_tokens": ANSWER}},
        train={"seq_length": 512, "total_steps": 16, "eval_interval": 1000, "tracker": None},
    )
    small = base.evolve(train={"minibatch_size": None, "trainer_kwargs": {"megatron_cfg": None}})
    is_tiny = trlx.TRLConfig.update(small, hparams or {}).model.model_path == "tiny"
    given = trlx.TRLConfig.update(small if is_tiny else base, hparams or {})
    exactly = {"min_new_tokens": given.method.gen_kwargs["max_new_tokens"]}
    return configure(given.evolve(method={"gen_kwargs": exactly}, train={"save_best": False}), None)


def half() -> Any:
    """0.5 for every sample, after a forward pass of a random OPT of 350 million weights over it."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096}
    judge = AutoModel.from_config(OPTConfig(**sizes, word_embed_proj_dim=1024))
    judge = judge.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()

    @torch.no_grad()
    def reward_fn(samples, tokenizer, **kwargs):
        for start in range(0, len(samples), 16):
            inputs = tokenizer(samples[start : start + 16], padding=True, return_tensors="pt").to(judge.device)
            judge(**inputs)
        return [0.5] * len(samples)

    return reward_fn


def always_half(samples, **kwargs) -> list[float]:
    """The same, for nothing."""
    return [0.5] * len(samples)


def main(hparams=None, data: str = "default", reward: str = "default", preset: str = "megatron_1.3b"):
    """Runs PPO; returns the medians that it prints."""
    config = speed_config(preset, hparams)
    trainer = trlx.train(
        reward_fn=chosen_reward(reward, half, always_half),
        prompts=[row["prompt"] for row in with_chosen(comparisons(data, "train", "Dahoas/rm-static"), 4096)],
        eval_prompts=["Human: Hello."],
        config=config,
    )
    lines = map(json.loads, (Path(config.train.checkpoint_dir) / "metrics.jsonl").read_text().splitlines())
    found = medians(lines, config.method.num_rollouts * config.method.gen_kwargs["max_new_tokens"])
    if trainer.backend.is_main:
        print(*(f"{name}: {value:.4g}" for name, value in found.items()), sep="\n")
    return found


def medians(lines: Iterable[dict[str, float]], tokens: int) -> dict[str, float]:
    """Seconds of every phase where it happened, and answer tokens per second of collections of `tokens`."""
    steps = [line for line in lines if "grad_norm" in line]
    measured = {name: [line[name] for line in steps if name in line] for name in PHASES}
    # the first of each warms up
    found = {name: median(values[1:] or values) for name, values in measured.items()}
    return found | {"answer tokens per second": tokens / found["time/rollout_time"]}


if __name__ == "__main__":
    main(**nemo_arguments(__doc__))
