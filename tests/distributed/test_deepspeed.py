"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes give what one process gives without it, and the same files."""

import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.test_two_processes import CALM, GREEDY, NO_DROPOUT, close
from tests.processes import together
from tests.runs import PROMPTS, metrics, run, share_of_a, tiny_config, weights
from tests.unit.test_seq2seq import run_of
from trlx.checkpoint import newest, read_optimizer
from trlx.optional import is_available

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not is_available("deepspeed"), reason="deepspeed is not installed"),
]
STAGES = pytest.mark.parametrize("stage", [2, 3])


def launched(stage):
    """What ``accelerate launch`` tells its processes when it is given the file of a stage, without bf16."""
    file = Path(__file__).parents[2] / "configs" / "accelerate" / f"zero{stage}.yaml"
    settings = ["--config_file", str(file), "--num_processes", "2", "--mixed_precision", "no"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args([*settings, "script.py"]))
    arguments.deepspeed_fields_from_accelerate_config = ""
    return {key: value for key, value in prepare_deepspeed_cmd_env(arguments)[1].items() if "DEEPSPEED" in key}


def zero(stage, fn, *args, **changes):
    """A run under ZeRO."""
    os.environ.update(launched(stage))
    trainer = fn(*args, **changes)
    assert trainer.backend.sharding.engine.zero_optimization_stage() == stage
    held = sum(weight.numel() for weight in trainer.backend.policy.parameters())
    assert (held == 0) is (stage == 3)


def both(stage, folder, fn, *args, method=None, train=None, **changes):
    """The same run on one process and, under ZeRO, on two."""
    changes = {"optimizer": CALM, **changes}
    method, train = method or {}, train or {}
    of_all = {"chunk_size": 8} if args[-1] == "PPO" else {}
    together(1, fn, *args, folder / "one", method=method | of_all, train={"batch_size": 6, **train}, **changes)
    train = {"batch_size": 3, **train}
    together(2, zero, stage, fn, *args, folder / "two", method=method, train=train, **changes)
    close(weights(folder / "one"), weights(folder / "two"))


@STAGES
@pytest.mark.parametrize(
    "train",
    [{}, {"minibatch_size": 1}, {"gradient_checkpointing": True}, {"max_grad_norm": 0.05}, {"max_grad_norm": None}],
    ids=["whole", "microbatches", "recomputed", "clipped", "not clipped"],
)
def test_ppo_equals_one_process(tmp_path, stage, train):
    both(stage, tmp_path, run, "PPO", method=GREEDY, train=train)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) >= 8
    for mine, theirs in zip(one, two, strict=True):
        shown = [name for name in mine if name != "padding_percentage"]  # each process trims its own rows
        assert [theirs[name] for name in shown] == pytest.approx([mine[name] for name in shown], abs=1e-4)


@STAGES
@pytest.mark.parametrize(
    ("model", "method"),
    [
        ({"num_layers_unfrozen": 1}, {}),
        ({"num_layers_unfrozen": 0}, {}),
        ({}, {"num_value_layers_unfrozen": 1}),
        ({"peft_config": {"peft_type": "LORA", "r": 4}}, {}),
        ({"peft_config": {"peft_type": "LORA", "r": 4, "bias": "all"}}, {}),
        ({"peft_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}}, {}),
    ],
    ids=["top block", "heads", "value blocks", "LoRA", "LoRA and biases", "prompt tuning"],
)
def test_ppo_of_a_part_of_the_weights_equals_one_process(tmp_path, stage, model, method):
    both(stage, tmp_path, run, "PPO", model={**NO_DROPOUT, **model}, method={**GREEDY, **method})


@STAGES
def test_an_encoder_decoder_equals_one_process(tmp_path, stage):
    both(stage, tmp_path, run_of, "bart", "PPO", method=GREEDY)


@STAGES
@pytest.mark.parametrize("algorithm", ["SFT", "ILQL"])
def test_offline_methods_equal_one_process(tmp_path, stage, algorithm):
    both(stage, tmp_path, run, algorithm, model=NO_DROPOUT)


@STAGES
@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "adam", "kwargs": {"lr": 3e-3, "eps": 1e-4}},
        {"name": "adamw", "kwargs": {"lr": 3e-3, "eps": 1e-4, "fused": False}},
        {"name": "sgd", "kwargs": {"lr": 0.1, "momentum": 0.9}},
    ],
    ids=["adam", "adamw not fused", "sgd"],
)
def test_optimizers_equal_those_of_one_process(tmp_path, stage, optimizer):
    both(stage, tmp_path, run, "SFT", model=NO_DROPOUT, optimizer=optimizer)


@STAGES
@pytest.mark.parametrize("algorithm", ["PPO", "SFT", "ILQL"])
def test_a_resumed_run_is_bit_equal(tmp_path, stage, algorithm):
    every = {"checkpoint_interval": 1}
    together(2, zero, stage, run, algorithm, tmp_path / "whole", train=every)
    together(2, zero, stage, run, algorithm, tmp_path / "parts", train={**every, "total_steps": 3})
    together(2, zero, stage, run, algorithm, tmp_path / "parts", train={**every, "resume_from_checkpoint": "auto"})
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@STAGES
def test_a_checkpoint_of_one_process_goes_on_in_parts_and_back(tmp_path, stage):
    alone, apart = (1, run), (2, zero, stage, run)
    changes = {"model": NO_DROPOUT, "optimizer": CALM}
    together(*alone, "SFT", tmp_path / "one", train={"batch_size": 4}, **changes)
    for size, steps in ((alone, 3), (apart, 6), (alone, 8)):
        train = {"batch_size": 4 // size[0], "total_steps": steps, "resume_from_checkpoint": "auto"}
        together(*size, "SFT", tmp_path / "turns", train=train, **changes)
    close(weights(tmp_path / "one"), weights(tmp_path / "turns"), tolerance=1e-6)
    states = [
        read_optimizer(newest(tmp_path / folder) / "optimizer.safetensors")["state"] for folder in ("one", "turns")
    ]
    for mine, theirs in zip(*(state.values() for state in states), strict=True):
        close(mine, theirs, tolerance=1e-6)


@STAGES
def test_the_exported_model_is_whole(tmp_path, stage):
    together(2, zero, stage, run, "PPO", tmp_path)
    folder = newest(tmp_path) / "hf_model"
    model, trained = AutoModelForCausalLM.from_pretrained(folder), weights(tmp_path)
    exported = model.state_dict()
    assert all(
        torch.equal(exported[name.removeprefix("model.")], trained[name]) for name in trained if "heads" not in name
    )
    heads = load_file(folder / "trlx_heads.safetensors")
    assert all(torch.equal(heads[name], trained[f"heads.{name}"]) for name in heads)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # tied


def evaluate_one_prompt(stage, folder):
    """The second process has nothing to generate; sampled lengths are different everywhere."""
    import trlx

    os.environ.update(launched(stage))
    config = tiny_config(folder, "PPO", train={"total_steps": 2})
    return trlx.train(config=config, reward_fn=share_of_a, prompts=PROMPTS, eval_prompts=PROMPTS[:1])


@STAGES
def test_a_process_without_prompts_keeps_nobody_waiting(tmp_path, stage):
    together(2, evaluate_one_prompt, stage, tmp_path)


def train_on_infinity(stage, folder):
    """After a step whose gradients are not finite, weights, optimizer and schedule are what they were."""
    os.environ.update(launched(stage))
    backend = run("SFT", folder, model=NO_DROPOUT, train={"total_steps": 2}).backend
    batch = tiny_batch()

    def state():
        trained = {name: backend.sharding.for_file(weight) for name, weight in backend._trained().items()}
        return trained, backend.sharding.optimizer_state()["state"], backend.scheduler.state_dict()

    def step(factor):
        # one process with such a loss is enough
        factor = -1.0 if backend.is_main else factor
        return backend.train_step(batch, lambda scores, batch: (scores.logprobs.sum() * factor, {}))

    before = state()
    for broken in (float("inf"), float("nan")):
        assert step(broken)["skipped_steps"] == 1.0
        (weights, optimizer, schedule), (old, old_optimizer, old_schedule) = state(), before
        assert all(torch.equal(weights[name], old[name]) for name in old) and schedule == old_schedule
        assert all(torch.equal(optimizer[i][name], old_optimizer[i][name]) for i in optimizer for name in optimizer[i])
    assert step(-1.0)["skipped_steps"] == 0.0
    weights, *_ = state()
    assert not backend.is_main or any(not torch.equal(weights[name], old[name]) for name in old)


def tiny_batch():
    """Two rows of three response tokens each."""
    from trlx.batch import Rollout
    from trlx.data.collate import collate

    return collate([Rollout([4, 5], [6, 7, 2]), Rollout([8], [9, 10, 2])], pad_id=0)


@STAGES
def test_a_step_that_is_not_finite_is_skipped(tmp_path, stage):
    together(2, train_on_infinity, stage, tmp_path)


@STAGES
def test_mixed_precision_rounds_as_without_deepspeed(tmp_path, stage):
    # one step: after it the last bit of a weight decides what it is rounded to
    changes = {"model": NO_DROPOUT, "optimizer": CALM, "train": {"mixed_precision": "bf16", "total_steps": 1}}
    together(2, run, "SFT", tmp_path / "ddp", **changes)
    together(2, zero, stage, run, "SFT", tmp_path / "zero", **changes)
    close(weights(tmp_path / "ddp"), weights(tmp_path / "zero"), tolerance=1e-7)


@STAGES
def test_mixed_precision_starts_at_the_reference(tmp_path, stage):
    together(2, zero, stage, run, "PPO", tmp_path, train={"mixed_precision": "bf16"}, model=NO_DROPOUT)
    first = next(line for line in metrics(tmp_path) if "policy/kl" in line)
    assert first["policy/kl"] == 0.0 and first["policy/ratio_deviation/max"] < 1e-2
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path).values())


def told_of_merging(folder):
    os.environ.update(launched(3))
    model = {**NO_DROPOUT, "peft_config": {"peft_type": "LORA", "r": 4}}
    trainer = run("SFT", folder, model=model, train={"total_steps": 1})
    with pytest.raises(ValueError, match="cannot be merged while weights are sharded"):
        trainer.save_pretrained(folder / "merged", merge=True)


def test_an_adapter_is_not_merged_while_weights_are_in_parts(tmp_path):
    together(2, told_of_merging, tmp_path)
