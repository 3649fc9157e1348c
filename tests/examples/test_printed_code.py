"""The Python code of the documentation runs as it is printed, with small models under the names of the hub.

docs/extending.md has a test of its own, tests/unit/test_extending.py.
"""

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification, GPT2LMHeadModel

import trlx
from examples.common import byte_tokenizer, share_of_vowels, tiny_gpt2
from trlx import api, registry
from trlx.method_configs import MethodConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHORT = {
    "method": {
        "num_rollouts": 2,
        "num_generations": 2,
        "chunk_size": 2,
        "ppo_epochs": 1,
        "n_generations_per_prompt": 4,
        "gen_kwargs": {"max_new_tokens": 4},
    },
    "train": {"total_steps": 1, "eval_interval": 1, "batch_size": 2, "minibatch_size": None, "tracker": None},
}
"""The settings of a short run; of the method's, those that the method has."""


def printed(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


SELF_CONTAINED = [page for page in PAGES if printed(page) and page.name != "extending.md"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where names of the hub are folders with a small model, runs have one step, and nothing stays registered."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    config = tiny_gpt2(tokenizer)
    for name in ("gpt2", "lvwerra/gpt2-imdb", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-0.6B"):
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, labels in (("lvwerra/distilbert-imdb", ["NEGATIVE", "POSITIVE"]), ("my/reward-model", ["LABEL_0"])):
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        GPT2ForSequenceClassification(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    choose = api._config
    monkeypatch.setattr(api, "_config", lambda *given: shortened(choose(*given)))
    for table in (registry.methods, registry.trainers, registry.pipelines):
        monkeypatch.setattr(table, "_classes", dict(table._classes))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(config: trlx.TRLConfig) -> trlx.TRLConfig:
    """One step of `config`, on the backend that divides no model."""
    method = {name: value for name, value in SHORT["method"].items() if name in vars(config.method)}
    config = config.evolve(**SHORT | {"method": method})
    config.train.trainer = config.train.trainer.replace("NeMo", "Accelerate")
    config.train.trainer_kwargs, config.train.mixed_precision = {}, None
    return config


@pytest.mark.parametrize("page", SELF_CONTAINED, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page, folder):
    names = {
        "trlx": trlx,
        "torch": torch,
        "dataclass": dataclass,
        "MethodConfig": MethodConfig,
        "asyncio": asyncio,
        **dict.fromkeys(["reward_fn", "helpful", "brief"], share_of_vowels),
        "prompts": ["My favourite animal is", "Yours is"],
        "config": trlx.load_preset("ppo"),
        "tokenizer": byte_tokenizer(),
    }
    for block in printed(page):
        exec(compile(block, page.name, "exec"), names)
    if "main" in names:
        names["main"]({"train.seed": 7})


def test_what_the_readme_saves_is_a_model(folder):
    (first, *_) = printed(ROOT / "README.md")
    exec(compile(first, "README.md", "exec"), {})
    assert AutoModelForCausalLM.from_pretrained("cats").config.model_type == "gpt2"
