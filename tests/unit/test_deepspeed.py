"""What launching with DeepSpeed asks for, and what is refused; nothing here needs DeepSpeed."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from tests.builders import tiny_gpt2
from tests.runs import run
from trlx.backends.deepspeed import Zero2, Zero3, wants_deepspeed, zero_for
from trlx.models.policy import build_policy

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
ASKED = "ACCELERATE_USE_DEEPSPEED"


def launched(name, *settings):
    """What ``accelerate launch`` tells its processes of DeepSpeed when it is given a file of ``configs/accelerate``."""
    file = CONFIGS / f"{name}.yaml"
    given = launch_command_parser().parse_args(["--config_file", str(file), *settings, "script.py"])
    arguments, *_ = _validate_launch_command(given)
    if not arguments.use_deepspeed:
        return {}
    arguments.deepspeed_fields_from_accelerate_config = ""
    environment = prepare_deepspeed_cmd_env(arguments)[1]
    return {key: value for key, value in environment.items() if key.startswith("ACCELERATE_")}


def chosen(monkeypatch, environment, max_grad_norm=1.0, precision="no"):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    return zero_for(SimpleNamespace(mixed_precision=precision), max_grad_norm)


@pytest.mark.parametrize(("name", "stage"), [("zero2", Zero2), ("zero3", Zero3)])
def test_the_configurations_name_their_stage(monkeypatch, name, stage):
    environment = launched(name)
    assert environment[ASKED] == "true" and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert type(chosen(monkeypatch, environment)) is stage


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_whole_step"])
def test_the_other_configurations_do_without_deepspeed(name):
    assert launched(name) == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--zero_stage", "1"], "zero_stage: 2 or 3"),
        (["--offload_optimizer_device", "cpu"], "offload_optimizer_device: none"),
        (["--offload_param_device", "cpu"], "offload_param_device: none"),
        (["--gradient_clipping", "1.0"], "train.max_grad_norm instead of gradient_clipping"),
        (["--gradient_accumulation_steps", "4"], "train.minibatch_size instead of gradient_accumulation_steps"),
    ],
)
def test_what_is_not_supported_is_told(monkeypatch, settings, words):
    with pytest.raises(ValueError, match=f"not supported as it is configured: set {words}$"):
        chosen(monkeypatch, launched("zero2", *settings))


def test_fp16_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="set train.mixed_precision: bf16$"):
        chosen(monkeypatch, launched("zero2"), precision="fp16")


def test_weights_in_another_precision_are_told():
    model = tiny_gpt2().to(torch.bfloat16)
    with pytest.raises(ValueError, match="all weights must be float32, but there are torch.bfloat16"):
        Zero2(SimpleNamespace(), 1.0).prepare(build_policy(model, value_head=True), torch.optim.AdamW)


class EightBit(torch.optim.AdamW):
    """From a module of its own, as those of bitsandbytes are."""


def test_an_optimizer_that_is_not_elementwise_is_told():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="optimizer.name must be adam, adamw or sgd"):
        Zero2(accelerator, 1.0).prepare(build_policy(tiny_gpt2()), EightBit)


def test_deepspeed_that_is_not_installed_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv(ASKED, "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r'pip install "trlx\[deepspeed\]"'):
        run("SFT", tmp_path)


def test_nobody_needs_deepspeed_who_does_not_ask_for_it(monkeypatch):
    monkeypatch.delenv(ASKED, raising=False)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert not wants_deepspeed()


def test_accelerate_does_not_see_that_deepspeed_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv(ASKED, "true")
    monkeypatch.setattr("trlx.backends.accelerate.wants_deepspeed", lambda: True)
    run("SFT", tmp_path, train={"total_steps": 1})  # Accelerate would miss the package
    assert os.environ[ASKED] == "true"


@pytest.mark.parametrize(("given", "told"), [(0.5, 0.5), (float("inf"), 0.0)])
def test_the_engine_clips_as_train_max_grad_norm_says(given, told):
    assert Zero3(SimpleNamespace(), given)._config()["gradient_clipping"] == told
