"""What scripts written for CarperAI's trlx do with the trainer that `trlx.train` returns."""

import operator
import pkgutil
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.runs import metrics, run, weights
from trlx.compat.attributes import ATTRIBUTES, OldNames


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    greedy = {"max_new_tokens": 3, "do_sample": False}
    method = {"gen_kwargs": greedy, "gen_experience_kwargs": {"max_new_tokens": 6}}
    return run("PPO", folder, method=method, train={"total_steps": 2, "checkpoint_interval": 1})


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_is_gone_names_its_successor(ppo, name):
    assert not hasattr(ppo, name)
    with pytest.raises(AttributeError) as caught:
        getattr(ppo, name)
    assert str(caught.value) == f"trainer.{name} of CarperAI's trlx is gone: {ATTRIBUTES[name]}"


def test_every_successor_is_there(ppo):
    for instead in ATTRIBUTES.values():
        for path in re.findall(r"\btrainer\.([a-z_.]+\w)", instead):
            if path != "pipeline":  # RFT's alone
                operator.attrgetter(path)(ppo)
        for place in re.findall(r"\btrlx(?:\.\w+)+", instead):
            assert pkgutil.resolve_name(place) is not None


def test_a_slip_is_an_ordinary_attribute_error(ppo):
    with pytest.raises(AttributeError, match="'AcceleratePPOTrainer' object has no attribute 'steps'"):
        ppo.steps  # noqa: B018


def test_a_property_that_fails_tells_its_own_error():
    class Broken(OldNames):
        @property
        def rows(self):
            return self.missing

    with pytest.raises(AttributeError, match="'Broken' object has no attribute 'missing'"):
        Broken().rows  # noqa: B018


def test_setting_what_nothing_reads_is_refused(ppo):
    for name in ("generate_kwargs", "kl_ctl", "make_experience", "iter_count", "model"):
        with pytest.raises(AttributeError, match=f"Setting trainer.{name} has no effect: .*; choose another name"):
            setattr(ppo, name, {})
    ppo.my_own = 3
    assert ppo.my_own == 3


def test_the_model_and_the_number_of_steps_are_there(ppo):
    assert ppo.iter_count == ppo.schedule.step == 2
    assert ppo.model is ppo.backend.policy.model
    ids = torch.tensor([[4, 5]])
    expected = ppo.generate(ids, do_sample=False, max_new_tokens=3)
    assert ppo.model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=2).tolist() == expected.tolist()


def test_evaluation_settings_are_those_of_generate_eval(ppo):
    torch.manual_seed(0)
    prompts = torch.tensor([[4, 5], [6, 7]])
    assert ppo.generate_eval(prompts).tolist() == ppo.generate(prompts, do_sample=False, max_new_tokens=3).tolist()
    assert ppo.generate_eval(prompts, max_new_tokens=1).shape == (2, 3)
    assert ppo.evaluate()["reward/mean"] >= 0


def test_the_models_of_ilql_and_megatron_say_why_they_are_not_there(tmp_path, ppo):
    ilql = run("ILQL", tmp_path, train={"total_steps": 1})
    with pytest.raises(AttributeError, match="would sample without the Q heads of ILQL"):
        ilql.model  # noqa: B018
    # the first value of the sweep over beta is 0
    prompts = torch.tensor([[4, 5]])
    greedy = {"do_sample": False, "max_new_tokens": 4}
    assert ilql.generate_eval(prompts, **greedy).tolist() == ilql.generate(prompts, beta=0, **greedy).tolist()
    ilql.backend = SimpleNamespace()
    with pytest.raises(AttributeError, match="on Megatron each process holds a part of the model"):
        ilql.model  # noqa: B018


def test_checkpoints_need_no_folder(tmp_path):
    trainer = run("SFT", tmp_path, train={"total_steps": 2, "checkpoint_interval": 1})
    whole = metrics(tmp_path)
    before = weights(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()
    trainer.load()
    assert torch.equal(trainer.model.lm_head.weight, before["model.transformer.wte.weight"])
    (tmp_path / "checkpoint_2").rename(tmp_path / "set_aside")
    trainer.save()
    assert (tmp_path / "checkpoint_2" / "hf_model" / "model.safetensors").is_file()
    run("SFT", tmp_path, train={"total_steps": 3, "resume_from_checkpoint": "auto"})
    assert metrics(tmp_path)[: len(whole)] == whole  # the saved run goes on in its own metrics.jsonl
    assert len(metrics(tmp_path)) == len(whole) + 2


def test_loading_without_any_checkpoint_says_where_it_looked(tmp_path):
    trainer = run("SFT", tmp_path / "run", train={"total_steps": 1})
    trainer.config.train.checkpoint_dir = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="No checkpoint at .*nowhere"):
        trainer.load()


def test_safe_serialization_may_be_said_and_not_denied(ppo, tmp_path):
    ppo.save_pretrained(str(tmp_path / "model"), safe_serialization=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, ppo.model.lm_head.weight)
    with pytest.raises(ValueError, match="writes safetensors only"):
        ppo.save_pretrained(tmp_path / "other", safe_serialization=False)
    with pytest.raises(TypeError, match="push_to_hub"):
        ppo.save_pretrained(tmp_path / "other", push_to_hub=True)
    assert not (tmp_path / "other").exists()
