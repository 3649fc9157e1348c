"""FSDP2: sharded weights on two processes give what one process gives, and the same files."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

from benchmarks.megatron_memory import scored
from tests.builders import char_tokenizer, tiny_gpt2_config
from tests.distributed.test_two_processes import CALM, GREEDY, NO_DROPOUT, close
from tests.processes import together
from tests.runs import PROMPTS, metrics, run, share_of_a, tiny_config, weights
from tests.unit.test_seq2seq import run_of
from trlx.backends.accelerate import AccelerateBackend
from trlx.batch import Rollout
from trlx.checkpoint import newest, read_optimizer
from trlx.data.collate import collate
from trlx.launch.plan.accelerate import AccelerateRun, Launch

pytestmark = pytest.mark.distributed

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"


def launched(name):
    """What ``accelerate launch --config_file configs/accelerate/<name>.yaml`` tells its processes, without bf16."""
    settings = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args([*settings, "script.py"]))
    return {key: value for key, value in prepare_multi_gpu_env(arguments).items() if "FSDP" in key}


def sharded(fn, *args, launch="fsdp2", **changes):
    """A run whose weights are sharded between any two steps."""
    os.environ.update(launched(launch))
    trainer = fn(*args, **changes)
    weights = list(trainer.backend.policy.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights)
    held, whole = (sum(each.numel() for each in found) for found in ([w.to_local() for w in weights], weights))
    assert held < 0.6 * whole


def both(folder, fn, *args, method=None, train=None, launch="fsdp2", **changes):
    """The same run on one process and, with sharded weights, on two."""
    changes = {"optimizer": CALM, **changes}
    method, train = method or {}, train or {}
    of_all = {"chunk_size": 8} if args[-1] == "PPO" else {}
    together(1, fn, *args, folder / "one", method=method | of_all, train={"batch_size": 6, **train}, **changes)
    train = {"batch_size": 3, **train}
    together(2, sharded, fn, *args, folder / "two", method=method, train=train, launch=launch, **changes)
    close(weights(folder / "one"), weights(folder / "two"))


def run_as_planned(*args, **changes):
    """A run after which each process holds what ``trlx plan`` says, shards' padding apart."""
    trainer = run(*args, **changes)
    backend, local = trainer.backend, lambda weight: getattr(weight, "to_local", lambda: weight)().nbytes
    launch = Launch(backend.data_size, shards=backend.data_size > 1)
    paper = AccelerateRun(trainer.config, launch, 2**33).phases()[-1].parts
    state = [value for each in backend.sharding.optimizer.state.values() for value in each.values()]
    held = {
        "weights": backend.policy.parameters(),
        "reference": backend.reference._kept,
        "optimizer": [value for value in state if value.dim()],
    }
    assert {name: sum(map(local, found)) for name, found in held.items()} == pytest.approx(
        {name: paper[name] for name in held}, rel=0.01
    )
    return trainer


class Held(TorchDispatchMode):
    """The most bytes of tensors that are made, or get their memory back from FSDP, in the block."""

    def __init__(self):
        super().__init__()
        self.peak, self.held, self.before = 0, {}, {}
        for found in gc.get_objects():
            if type(found) in (torch.Tensor, torch.nn.Parameter):
                storage = found.untyped_storage()
                (self.before if storage.nbytes() else self.held)[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # then it comes again with its shard
        made = fn(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.follow, made)
        alive = {place: storage for place, ref in self.held.items() if (storage := ref()) is not None}
        self.held = {place: self.held[place] for place in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
        return made

    def follow(self, tensor):
        storage = tensor.untyped_storage()
        if not any(storage._cdata in known and known[storage._cdata]() for known in (self.before, self.held)):
            self.held[storage._cdata] = weakref.ref(storage)


def peaks_as_planned(folder):
    """A step of two microbatches, and scoring, take what ``trlx plan`` says, within 10 %."""
    os.environ.update(launched("fsdp2"))
    config = tiny_config(
        folder,
        "GRPO",
        method={"gen_kwargs": {"max_new_tokens": 32}},
        model={"model_path": tiny_gpt2_config(vocab_size=500, layers=6, hidden=192, n_head=6)},
        train={"seq_length": 48, "batch_size": 8, "minibatch_size": 4, "mixed_precision": "bf16", "packing": "off"},
    )
    paper = AccelerateRun(config, Launch(2, shards=True), 2**33)
    sections = {"model": config.model, "optimizer": config.optimizer, "scheduler": config.scheduler}
    backend = AccelerateBackend(**sections, train=config.train, tokenizer=char_tokenizer(), needs=paper.needs)
    batch = collate([Rollout([5] * 16, [6] * 32)] * 8, 0)
    backend.train_step(batch, scored)  # the first step makes moments
    with Held() as update:
        backend.train_step(batch, scored)
    with Held() as scoring, backend.for_sampling():
        backend.evaluate(batch)
    if not backend.is_main:
        return
    phases = {phase.name: phase.parts for phase in paper.phases()}
    made = sum(phases["update"][name] for name in ("gradients", "activations", "temporary"))
    assert update.peak == pytest.approx(made, rel=0.1)
    assert scoring.peak == pytest.approx(phases["scoring"]["temporary"], rel=0.1)
    # in parts: whole gradients alone would take 11.1 million bytes
    assert phases["update"]["gradients"] == pytest.approx(5.56e6, rel=0.01)


def test_a_process_takes_what_the_plan_says_in_a_step_of_two_microbatches(tmp_path):
    together(2, peaks_as_planned, tmp_path)


@pytest.mark.parametrize("train", [{}, {"minibatch_size": 1}, {"gradient_checkpointing": True}])
def test_ppo_equals_one_process(tmp_path, train):
    both(tmp_path, run if train else run_as_planned, "PPO", method=GREEDY, train=train)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) >= 8
    for mine, theirs in zip(one, two, strict=True):
        shown = [name for name in mine if name != "padding_percentage"]  # each process trims its own rows
        assert [theirs[name] for name in shown] == pytest.approx([mine[name] for name in shown], abs=1e-4)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ({"num_layers_unfrozen": 1}, {}),
        ({"num_layers_unfrozen": 0}, {}),
        ({}, {"num_value_layers_unfrozen": 1}),
        ({"peft_config": {"peft_type": "LORA", "r": 4}}, {}),
        ({"peft_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}}, {}),
    ],
    ids=["top block", "heads", "value blocks", "LoRA", "prompt tuning"],
)
def test_ppo_of_a_part_of_the_weights_equals_one_process(tmp_path, model, method):
    both(tmp_path, run, "PPO", model={**NO_DROPOUT, **model}, method={**GREEDY, **method})


def test_an_encoder_decoder_equals_one_process(tmp_path):
    both(tmp_path, run_of, "bart", "PPO", method=GREEDY)


@pytest.mark.parametrize("algorithm", ["SFT", "ILQL"])
def test_offline_methods_equal_one_process(tmp_path, algorithm):
    both(tmp_path, run, algorithm, model=NO_DROPOUT)


def test_weights_that_stay_whole_through_a_step_equal_one_process(tmp_path):
    both(tmp_path, run, "PPO", method=GREEDY, launch="fsdp2_whole_step")


@pytest.mark.parametrize(("name", "reshards"), [("fsdp2", "true"), ("fsdp2_whole_step", "false")])
def test_the_configurations_say_when_weights_are_given_up(name, reshards):
    assert launched(name)["FSDP_RESHARD_AFTER_FORWARD"] == reshards


def test_ddp_is_launched_without_sharding():
    assert launched("ddp") == {}


@pytest.mark.parametrize("algorithm", ["PPO", "SFT"])
def test_a_resumed_run_is_bit_equal(tmp_path, algorithm):
    every = {"checkpoint_interval": 1}
    together(2, sharded, run, algorithm, tmp_path / "whole", train=every)
    together(2, sharded, run, algorithm, tmp_path / "parts", train={**every, "total_steps": 3})
    together(2, sharded, run, algorithm, tmp_path / "parts", train={**every, "resume_from_checkpoint": "auto"})
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_checkpoint_of_one_process_goes_on_in_parts_and_back(tmp_path):
    alone, apart = (1, run), (2, sharded, run)
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


def test_the_exported_model_is_whole(tmp_path):
    together(2, sharded, run, "PPO", tmp_path)
    folder = newest(tmp_path) / "hf_model"
    model, trained = AutoModelForCausalLM.from_pretrained(folder), weights(tmp_path)
    exported = model.state_dict()
    assert all(
        torch.equal(exported[name.removeprefix("model.")], trained[name]) for name in trained if "heads" not in name
    )
    heads = load_file(folder / "trlx_heads.safetensors")
    assert all(torch.equal(heads[name], trained[f"heads.{name}"]) for name in heads)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # tied


def gathered(folder):
    """Compares what a sampler with a copy is given with what was exported."""
    os.environ.update(launched("fsdp2"))
    trainer = run("SFT", folder, train={"total_steps": 1})
    found = dict(trainer.backend.weights_by_name())
    if not trainer.backend.is_main:
        assert not found
        return
    exported = AutoModelForCausalLM.from_pretrained(newest(folder) / "hf_model")
    wanted = dict(exported.named_parameters())
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_sampler_with_a_copy_gets_whole_weights_on_one_process(tmp_path):
    together(2, gathered, tmp_path)


def evaluate_one_prompt(folder):
    """The second process has nothing to generate; sampled lengths are different everywhere."""
    import trlx

    os.environ.update(launched("fsdp2"))
    config = tiny_config(folder, "PPO", train={"total_steps": 2})
    return trlx.train(config=config, reward_fn=share_of_a, prompts=PROMPTS, eval_prompts=PROMPTS[:1])


def test_a_process_without_prompts_keeps_nobody_waiting(tmp_path):
    together(2, evaluate_one_prompt, tmp_path)


def test_mixed_precision_starts_at_the_reference(tmp_path):
    together(
        2, sharded, run, "PPO", tmp_path, train={"mixed_precision": "bf16"}, model={"model_path": tiny_gpt2_config()}
    )
    first = next(line for line in metrics(tmp_path) if "policy/kl" in line)
    assert first["policy/kl"] == 0.0 and first["policy/ratio_deviation/max"] < 1e-2
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path).values())


def told(words, settings, changes):
    """A run that accelerate has configured like this is told so."""
    os.environ.update(launched("fsdp2") | settings)
    with pytest.raises(ValueError) as raised:
        run("SFT", "unused", **changes)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("words", "settings", "changes"),
    [
        ("set fsdp_version: 2", {"FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "false"}, {}),
        ("set fsdp_offload_params: false", {"FSDP_OFFLOAD_PARAMS": "true"}, {}),
        ("set fsdp_cpu_ram_efficient_loading: false", {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}),
        ("train.gradient_checkpointing: true", {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}),
        ("train.compile needs all weights on each process", {}, {"train": {"compile": True}}),
        ("'adamw_8bit_bnb' does not work under FSDP", {}, {"optimizer": {"name": "adamw_8bit_bnb"}}),
    ],
)
def test_what_is_not_supported_is_told(words, settings, changes):
    together(2, told, words, settings, changes)


def told_of_dtypes(folder):
    os.environ.update(launched("fsdp2"))
    model = {"model_path": tiny_gpt2_config(), "model_extra_configs": {"dtype": "bfloat16"}}
    with pytest.raises(ValueError, match="must have one dtype, but there are torch.bfloat16, torch.float32"):
        run("PPO", folder, model=model)


def test_heads_in_float32_beside_a_model_that_is_not_are_told(tmp_path):
    together(2, told_of_dtypes, tmp_path)


def told_of_merging(folder):
    os.environ.update(launched("fsdp2"))
    model = {**NO_DROPOUT, "peft_config": {"peft_type": "LORA", "r": 4}}
    trainer = run("SFT", folder, model=model, train={"total_steps": 1})
    with pytest.raises(ValueError, match="cannot be merged while weights are sharded"):
        trainer.save_pretrained(folder / "merged", merge=True)


def test_an_adapter_is_not_merged_while_weights_are_in_parts(tmp_path):
    together(2, told_of_merging, tmp_path)


def test_a_reward_model_equals_one_process(tmp_path):
    changes = {"model": NO_DROPOUT, "optimizer": CALM}
    together(1, run, "Reward", tmp_path / "one", train={"batch_size": 4}, **changes)
    together(2, sharded, run, "Reward", tmp_path / "two", train={"batch_size": 2}, **changes)
    close(weights(tmp_path / "one"), weights(tmp_path / "two"))
