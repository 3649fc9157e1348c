"""The page about methods of one's own: its code runs as printed."""

import importlib
import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch

from tests.builders import VOCABULARY, char_tokenizer, tiny_gpt2
from tests.runs import PROMPTS, share_of_a, tiny_config

PAGE = (Path(__file__).parents[2] / "docs" / "own-method.md").read_text()


@pytest.fixture
def printed(tmp_path, monkeypatch) -> Path:
    """A folder with every file of the page, and a "gpt2" that gives each token of `char_tokenizer` one probability."""
    for name, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).write_text(text)
    model = tiny_gpt2()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "gpt2")
    char_tokenizer().save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def logged(folder: Path) -> list[dict[str, float]]:
    """What every step logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


def test_the_whole_example_trains_with_the_loss_it_says(printed):
    trainer = runpy.run_path(str(printed / "train.py"))["trainer"]
    first, *_, last = logged(printed / "ckpts" / "rwr")
    # log p is -ln V for every token; 6 tokens (" four" and eos) weigh e^(1 / 0.5), 7 tokens weigh 1
    assert first["loss"] == pytest.approx((6 * math.e**2 + 7) / 13 * math.log(VOCABULARY), abs=1e-5)
    assert first["weight"] == pytest.approx((math.e**2 + 1) / 2, abs=1e-5)
    assert last["loss"] < first["loss"]
    assert trainer.iter_count == 10 == len(logged(printed / "ckpts" / "rwr"))
    assert (printed / "rwr-model" / "model.safetensors").is_file()


def test_the_changed_ppo_adds_its_term_and_the_own_pipeline_its_words(printed):
    import trlx

    importlib.import_module("ppo_kl")
    importlib.import_module("polite")
    seen = []

    def reward_fn(prompts, **kwargs):
        seen.extend(prompts)
        return share_of_a(prompts=prompts, **kwargs)

    names = {"trainer": "AcceleratePPOWithKLTrainer", "pipeline": "PolitePipeline"}
    config = tiny_config(
        printed / "out",
        "PPO",
        method={"name": "PPOWithKLConfig", "kl_loss_coef": 0.5, "ppo_epochs": 1},
        train={**names, "total_steps": 2, "seq_length": 30},
    )
    trainer = trlx.train(reward_fn=reward_fn, prompts=PROMPTS, config=config)
    first, second = logged(printed / "out")
    assert first["losses/kl"] == pytest.approx(0, abs=1e-5)
    assert second["losses/kl"] > 1e-5
    assert trainer.method.kl_loss_coef == 0.5
    assert set(seen) == {f"please: {prompt}" for prompt in PROMPTS}
