"""PPO and SFT end to end on tiny models of many architectures."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import trlx
from tests.runs import PROMPTS, metrics, run, tiny_config
from tests.unit.tiny_models import FAMILIES

CHOSEN = "gpt2 gpt_neox opt bloom llama qwen2 qwen3 mistral gemma2 phi gptj falcon".split()


def config_of(name):
    family = FAMILIES[name]
    return family.config(**family.sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize(("layers", "value_layers"), [(-1, 0), (0, 0), (1, 2)])
def test_ppo_starts_at_the_reference_trains_and_saves(tmp_path, name, layers, value_layers):
    model = {"model_path": config_of(name), "num_layers_unfrozen": layers}
    method = {"num_value_layers_unfrozen": value_layers}
    config = tiny_config(tmp_path, "PPO", model=model, method=method, train={"total_steps": 3, "eval_interval": 99})
    trainer = trlx.train(config=config, reward_fn=size, prompts=PROMPTS)
    first = next(line for line in metrics(tmp_path) if "ratio" in line)
    assert first["policy/kl"] == 0.0 and first["policy/ratio_deviation/max"] < 1e-5
    assert all(line["skipped_steps"] == 0 and line["grad_norm"] > 0 for line in metrics(tmp_path) if "ratio" in line)
    same_logits(trainer, tmp_path / "checkpoint_3" / "hf_model")


@pytest.mark.parametrize("name", CHOSEN)
def test_sft_lowers_its_loss(tmp_path, name):
    changes = {"model": {"model_path": config_of(name)}, "train": {"total_steps": 10, "eval_interval": 99}}
    trainer = run("SFT", tmp_path, **changes)
    losses = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    same_logits(trainer, tmp_path / "checkpoint_10" / "hf_model")


def size(outputs, **kwargs):
    return [float(len(output)) for output in outputs]


def same_logits(trainer, folder):
    loaded, ids = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        trained = trainer.backend.policy.model.eval()(ids).logits
    torch.testing.assert_close(loaded(ids).logits, trained, rtol=0, atol=1e-6)  # GELU has another rounding
