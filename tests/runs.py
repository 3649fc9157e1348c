"""Whole training runs of seconds, on tiny random models; importable by processes that tests start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.builders import char_tokenizer, tiny_gpt2_config
from trlx.config import TRLConfig

PROMPTS = ["ab", "b", "cab", "da", "e", "fed", "gab", "h"]
TEXTS = ["abc abc", "bcd", "cde cde cde", "aaa", "dcba", "hello", "fade", "bead bead"]
DIALOGUES = [
    ["ab", "ca"],
    ["b", "bcd"],
    ["cab", "aaa"],
    ["da", "a"],
    ["e", "fg", "h", "aa"],
    ["fed", "cab"],
    ["g", "e"],
]
PAIRS = [{"prompt": p, "chosen": p + "a", "rejected": "b" * (1 + i % 3)} for i, p in enumerate(PROMPTS[:7])]
LABELS = [{"prompt": p, "completion": p + "ab"[i % 2], "label": i % 2 == 0} for i, p in enumerate(PROMPTS[:7])]
REWARDS = [0.5, 0.0, 1.0, 1.0, 0.7, 0.3, 0.0]


def tiny_config(folder: str | Path, algorithm: str, **changes: Any) -> TRLConfig:
    """A config that trains a two-layer GPT-2 on characters for 8 steps; `changes` as in ``evolve``."""
    tokenizer = char_tokenizer()
    generation = {} if algorithm == "Reward" else {"gen_kwargs": {"max_new_tokens": 6}}
    config = TRLConfig.from_dict(
        {
            "method": {"name": f"{algorithm}Config", **generation, **_METHODS[algorithm]},
            "model": {"model_path": tiny_gpt2_config(resid_pdrop=0.1)},
            "tokenizer": {"tokenizer_path": tokenizer},
            "optimizer": {"name": "adamw", "kwargs": {"lr": 3e-3}},
            "scheduler": {"name": "cosine_annealing", "kwargs": {"T_max": 50, "eta_min": 1e-4}},
            "train": {
                "total_steps": 8,
                "seq_length": 16,
                "epochs": 20,
                "batch_size": 4,
                "checkpoint_interval": 4,
                "eval_interval": 4,
                "pipeline": "PromptPipeline",
                "trainer": f"Accelerate{algorithm}Trainer",
                "tracker": None,
                "checkpoint_dir": str(folder),
            },
        }
    )
    return config.evolve(**changes)


_METHODS: dict[str, dict[str, Any]] = {
    "PPO": {
        "num_rollouts": 8,
        "chunk_size": 4,
        "ppo_epochs": 2,
        "init_kl_coef": 0.05,
        "target": 1.0,
        "scale_reward": "running",
    },
    "GRPO": {"num_rollouts": 8, "chunk_size": 4, "num_generations": 4, "num_iterations": 2, "kl_coef": 0.05},
    "SFT": {},
    "ILQL": {
        "alpha": 0.5,
        "steps_for_target_q_sync": 2,
        "gen_kwargs": {"max_new_tokens": 6, "beta": [0, 2], "top_k": 10},
    },
    "DPO": {"beta": 0.5},
    "KTO": {"beta": 0.5, "undesirable_weight": 1.5},
    "Reward": {},
    "RFT": {"n_improve_steps": 2, "n_generations_per_prompt": 4, "start_percentile": 0.5},
}


def share_of_a(samples, prompts, outputs, **kwargs) -> list[float]:
    """A reward that a tiny model learns at once: how much of the output is the letter a."""
    return [output.count("a") / max(len(output), 1) for output in outputs]


def length(samples, **kwargs) -> dict[str, list[int]]:
    """A metric."""
    return {"length": [len(sample) for sample in samples]}


WITH_MARGIN = [{**pair, "margin": 0.5 * (i % 2)} for i, pair in enumerate(PAIRS)]
ONLINE = {"reward_fn": share_of_a, "prompts": PROMPTS}
DATA: dict[str, dict[str, Any]] = {
    "PPO": ONLINE,
    "GRPO": ONLINE,
    "SFT": {"samples": TEXTS, "eval_prompts": PROMPTS},
    "ILQL": {"samples": DIALOGUES, "rewards": REWARDS, "eval_prompts": PROMPTS},
    "RFT": ONLINE,
    "KTO": {"samples": LABELS, "eval_prompts": PROMPTS, "eval_samples": LABELS[:3]},
    "DPO": {"samples": PAIRS, "eval_prompts": PROMPTS, "eval_samples": PAIRS[:3]},
    "Reward": {"samples": WITH_MARGIN, "eval_samples": WITH_MARGIN[:3]},
}
"""What each algorithm learns from in these runs."""


def run(algorithm: str, folder: str | Path, **changes: Any):
    """Trains; returns the trainer."""
    import trlx

    config = tiny_config(folder, algorithm, **changes)
    metric = {} if algorithm == "Reward" else {"metric_fn": length}
    return trlx.train(config=config, **metric, **DATA[algorithm])


def metrics(folder: str | Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what is measured of the machine."""
    lines = (json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines())
    of_the_machine = ("time/", "memory/")
    return [{name: value for name, value in line.items() if not name.startswith(of_the_machine)} for line in lines]


def weights(folder: str | Path):
    """The trained weights of the newest checkpoint, by name."""
    from safetensors.torch import load_file

    from trlx.checkpoint import newest

    return load_file(newest(folder) / "policy.safetensors")
