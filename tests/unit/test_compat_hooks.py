"""Classes of users: what would never be called is refused, and what is called counts."""

import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import trlx
from tests.builders import char_tokenizer
from tests.runs import PROMPTS, TEXTS, share_of_a, tiny_config
from trlx.compat.hooks import HOOKS
from trlx.data.prompts import PromptPipeline
from trlx.method_configs import MethodConfig, PPOConfig
from trlx.registry import trainers
from trlx.trainer.accelerate import (
    AccelerateILQLTrainer,
    AcceleratePPOTrainer,
    AccelerateRFTTrainer,
    AccelerateSFTTrainer,
)

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def old_loss(self, batch):
    """As the original called it."""


def function(self, *args, **kwargs):
    """Any other hook."""


def subclass(base: type, **members) -> type:
    return type(f"My{base.__name__}", (base,), members)


@pytest.mark.parametrize("hook", HOOKS["trainer"])
@pytest.mark.parametrize("base", [AcceleratePPOTrainer, AccelerateRFTTrainer])
def test_a_trainer_with_a_hook_that_nothing_calls_is_not_registered(base, hook):
    cls = subclass(base, **{hook: old_loss if hook == "loss" else function})
    with pytest.raises(TypeError) as caught:
        trlx.register_trainer(cls)
    advice = f"instead of {hook}: {HOOKS['trainer'][hook]}. See"
    assert f"My{base.__name__} overrides methods that trlx does not call: {advice}" in str(caught.value)
    assert cls.__name__ not in trainers.names()


def test_one_error_names_every_hook_of_a_class_its_mixins_included():
    mixin = type("Mixin", (), {"decode": function})
    cls = type("Mine", (mixin, AcceleratePPOTrainer), {"get_arch": function, "post_backward_callback": function})
    with pytest.raises(TypeError, match=r"after_step.*needs\(method\).*stop_sequences"):
        trlx.register_trainer("Mine")(cls)


def test_what_is_called_is_registered():
    offline = [
        subclass(AccelerateSFTTrainer, make_experience=function),
        subclass(AccelerateILQLTrainer, make_experience=function),
    ]
    named = {
        "collect": function,
        "loss": lambda self, scores, batch: None,
        "after_step": function,
        "evaluate": function,
    }
    for cls in (*offline, subclass(AcceleratePPOTrainer, **named)):
        assert trlx.register_trainer(cls) is cls


@pytest.mark.parametrize("hook", HOOKS["method"])
def test_a_method_that_computes_by_itself_is_not_registered(hook):
    advice = f"instead of {hook}: {HOOKS['method'][hook]}"
    with pytest.raises(TypeError, match=rf"MyPPOConfig overrides .*: {re.escape(advice)}"):
        trlx.register_method(subclass(PPOConfig, **{hook: function}))


def test_a_setting_may_have_the_name_of_a_hook():
    @dataclass
    @trlx.register_method
    class SettingNamedLoss(MethodConfig):
        name: str = "SettingNamedLoss"
        loss: str = "hinge"

    assert SettingNamedLoss().loss == "hinge"


def test_a_class_that_was_never_registered_is_refused_when_a_trainer_is_built(tmp_path):
    with pytest.raises(TypeError, match="instead of make_experience: override collect"):
        subclass(AcceleratePPOTrainer, make_experience=function)(tiny_config(tmp_path, "PPO"), share_of_a)
    config = tiny_config(tmp_path, "PPO")
    config.method.__class__ = subclass(PPOConfig, loss=function)
    with pytest.raises(
        TypeError, match=r"instead of loss: override loss\(outputs, batch\) or advantages\(batch\) of a trainer"
    ):
        AcceleratePPOTrainer(config, share_of_a)


def test_a_hook_put_on_one_of_our_own_classes_is_refused_when_a_trainer_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(AcceleratePPOTrainer, "post_epoch_callback", function, raising=False)
    with pytest.raises(TypeError, match=r"instead of post_epoch_callback: override collect\(\)"):
        AcceleratePPOTrainer(tiny_config(tmp_path, "PPO"), share_of_a)
    monkeypatch.undo()
    monkeypatch.setattr(PPOConfig, "get_advantages_and_returns", function, raising=False)
    with pytest.raises(TypeError, match="PPOConfig overrides .*: instead of get_advantages_and_returns: "):
        AcceleratePPOTrainer(tiny_config(tmp_path, "PPO"), share_of_a)


def test_a_pipeline_is_refused_where_it_makes_a_loader_or_lacks_what_is_asked_for():
    with pytest.raises(TypeError, match=r"MyPromptPipeline .*: instead of create_loader: .* as pipeline\[i\]"):
        trlx.register_datapipeline(subclass(PromptPipeline, create_loader=function))
    with pytest.raises(
        TypeError, match="Bare needs __len__ and digest to be a pipeline: subclass trlx.data.prompts.Prom"
    ):
        trlx.register_datapipeline(type("Bare", (), {"__getitem__": function}))
    with pytest.raises(NotImplementedError, match=r"has no loader: read prompts as pipeline\[i\]"):
        PromptPipeline(["a"], 4, char_tokenizer()).create_loader(2, shuffle=True)


def test_a_pipeline_of_something_else_than_prompts_is_refused_before_training(tmp_path):
    @trlx.register_datapipeline
    class OfDicts(PromptPipeline):
        def __getitem__(self, index):
            return {"input_ids": self.prompts[index].ids}

    config = tiny_config(tmp_path, "PPO", train={"pipeline": "OfDicts"})
    with pytest.raises(TypeError, match=r"OfDicts\[0\] must be a trlx\.data\.prompts\.Prompt, got a dict"):
        trlx.train(reward_fn=share_of_a, prompts=PROMPTS, config=config)


def test_a_trainer_that_is_none_is_refused_by_name(tmp_path):
    trlx.register_trainer(type("NoTrainer", (), {}))
    config = tiny_config(tmp_path, "SFT", train={"trainer": "NoTrainer"})
    with pytest.raises(TypeError, match=r"NoTrainer must subclass trlx\.trainer\.base\.Trainer"):
        trlx.train(samples=TEXTS, config=config)


def test_overriding_what_users_call_changes_what_the_loop_does(tmp_path):
    calls = []

    def recorded(name):
        def method(self, *args, **kwargs):
            calls.append(name)
            return getattr(super(cls, self), name)(*args, **kwargs)

        return method

    names = ("collect", "after_step", "evaluate", "save", "save_pretrained", "add_eval_pipeline", "make_experience")
    cls = type("Recorded", (AccelerateSFTTrainer,), {name: recorded(name) for name in names})
    trlx.register_trainer(cls)
    config = tiny_config(tmp_path, "SFT", train={"trainer": "Recorded", "total_steps": 1})
    trlx.train(samples=TEXTS, eval_prompts=PROMPTS, config=config)
    start = ["make_experience", "add_eval_pipeline", "evaluate", "collect", "after_step", "evaluate"]
    assert calls == [*start, "save", "save_pretrained"]


def test_the_advice_names_what_is_there_and_the_page_has_every_hook():
    for kind, hooks in HOOKS.items():
        for hook, instead in hooks.items():
            assert f"`{hook}" in PAGE, hook
            for place in re.findall(r"\btrlx(?:\.\w+)+", instead):
                assert pkgutil.resolve_name(place) is not None
            for method in re.findall(r"override (\w+)\(", instead):
                assert kind == "pipeline" or hasattr(AcceleratePPOTrainer, method), method
