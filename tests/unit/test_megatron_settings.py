"""The settings read from a NeMo config, and the ones that are refused."""

import itertools
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.unit.megatron_configs import ROOT, SMALL, bare, model, read, settings_of
from trlx.backends.megatron import settings
from trlx.backends.megatron.learning_rate import Annealing, Constant
from trlx.backends.megatron.nemo.decoder import read_decoder
from trlx.backends.megatron.nemo.file import Lookup
from trlx.backends.megatron.settings import ParallelSizes, Recompute
from trlx.compat.functions import default_nemo_20b_config
from trlx.presets import load_preset, megatron_preset
from trlx.strict import ConfigError


def test_without_a_file_everything_comes_from_the_configs_own_sections():
    config = load_preset("ppo").evolve(train={"minibatch_size": 2, "gradient_checkpointing": True, "seed": 7})
    found = settings_of(config.evolve(train={"mixed_precision": "bf16", "max_grad_norm": 0.5}))
    assert found.sizes == ParallelSizes(1, 1, None, False) and found.recompute == Recompute("full", "uniform", 1)
    assert (found.dtype, found.micro_batch_size, found.max_grad_norm) == (torch.bfloat16, 2, 0.5)
    assert (found.seed, found.num_layers_unfrozen, found.decoder) == (7, 2, None)
    assert found.pretrained_model == "lvwerra/gpt2-imdb"
    optim = found.optim
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay) == ("adam", 3e-5, (0.9, 0.95), 1e-6)
    assert optim.decoupled_weight_decay and not optim.distributed
    assert optim.schedule == Annealing("cosine", max_steps=10**12, min_lr=3e-5)


def test_sections_that_say_nothing_leave_the_optimizer_to_the_file():
    optim = {"name": "fused_adam", "lr": 0.5, "betas": [0.8, 0.9], "sched": {"warmup_steps": 2, "min_lr": 0.1}}
    found = read(model(optim=optim)).optim
    assert (found.lr, found.betas, found.weight_decay) == (0.5, (0.8, 0.9), 0.0)
    assert found.schedule == Annealing("cosine", max_steps=100, warmup_steps=2, min_lr=0.1)


def test_a_section_that_says_something_replaces_the_files_whole():
    written = {"name": "fused_adam", "lr": 0.5, "betas": [0.8, 0.9], "sched": {"warmup_steps": 2, "min_lr": 0.1}}
    found = read(model(optim=written), optimizer={"kwargs": {"lr": 0.25}}).optim
    assert (found.lr, found.betas, found.weight_decay, found.schedule.warmup_steps) == (0.25, (0.9, 0.999), 0.01, 2)
    assert read(model(optim=written), scheduler={"kwargs": {"warmup_steps": 5}}).optim.schedule == Constant(5)


def test_a_file_whose_optimizer_or_schedule_is_not_read_is_named(caplog):
    config = load_preset("ppo").evolve(train={"trainer_kwargs": {"megatron_cfg": "megatron_20b"}})
    with caplog.at_level(logging.WARNING):
        assert not settings_of(config).optim.distributed
        ours, schedules = caplog.messages
        assert (
            "optimizer section (adamw) wins over megatron_cfg.model.optim, whose name distributed_fused_adam, " in ours
        )
        assert "lr 6e-05" in ours and "betas" not in ours
        assert "scheduler section (cosine_annealing) wins over megatron_cfg.model.optim.sched, whose " in schedules
        caplog.clear()
        # the presets say in the sections what the file says
        settings_of(load_preset("ppo", "megatron_20b"))
        read(model(optim={"name": "fused_adam", "lr": 0.5, "sched": {"warmup_steps": 2}}))
    assert caplog.messages == []


def test_a_files_microbatch_is_taken_where_train_does_not_say_it_and_never_exceeds_the_batch():
    written = {**model(micro_batch_size=4), "trainer": {"max_steps": 5}}
    assert read(written).micro_batch_size == 4
    assert read(written, train={"minibatch_size": 2}).micro_batch_size == 2
    assert read(model(micro_batch_size=32)).micro_batch_size == 8
    assert read().micro_batch_size == 8


@pytest.mark.parametrize(
    ("written", "in_train", "expected"),
    [(0.5, 1.0, 0.5), (0.5, 2.0, 2.0), (0, 1.0, None), (None, 1.0, 1.0), (0.5, None, None)],
)
def test_the_files_clipping_counts_unless_train_says_another_than_its_default(written, in_train, expected):
    found = read({"trainer": {"gradient_clip_val": written}}, train={"max_grad_norm": in_train})
    assert found.max_grad_norm == expected


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        *itertools.product((32, "32", "32-true"), [torch.float32]),
        *itertools.product(("bf16", "bf16-mixed"), [torch.bfloat16]),
        *itertools.product((16, "16", "16-mixed"), [torch.float16]),
    ],
)
def test_every_way_to_write_a_precision_is_understood(precision, expected):
    assert read({"trainer": {"precision": precision}}).dtype == expected
    assert read(model(precision=precision)).dtype == expected
    assert read({"trainer": {"precision": precision}}, train={"mixed_precision": "no"}).dtype == torch.float32


def test_shorthands_stand_beside_a_file_or_without_one_and_win():
    shorthand = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "virtual_pipeline_model_parallel_size": 2}
    assert read(trainer_kwargs=shorthand).sizes == ParallelSizes(2, 1, 2, True)
    written = model(tensor_model_parallel_size=4, pipeline_model_parallel_size=3)
    assert read(written, trainer_kwargs=shorthand).sizes == ParallelSizes(2, 3, 2, True)


def test_sequence_parallelism_without_tensor_parallelism_is_off_with_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr(settings.logger, "warning", said.append)
    assert read(model(sequence_parallel=True)).sizes == ParallelSizes()
    assert ["sequence_parallel is off" in line for line in said] == [True]


def test_recomputation_is_the_files_where_it_says_one():
    keys = {"activations_checkpoint_method": "uniform", "activations_checkpoint_num_layers": 3}
    selective = model(activations_checkpoint_granularity="selective", **keys)
    assert read(selective, train={"gradient_checkpointing": True}).recompute == Recompute("selective", None, None)
    assert read(train={"gradient_checkpointing": "selective"}).recompute == Recompute("selective", None, None)
    assert read(model(activations_checkpoint_granularity="full", **keys)).recompute == Recompute("full", "uniform", 3)
    assert read(model(**keys)).recompute == Recompute(None, None, None)


@pytest.mark.parametrize(
    ("name", "kind", "decoupled", "distributed", "weight_decay"),
    [
        ("adam", "adam", False, False, 0.0),
        ("adamw", "adam", True, False, 0.01),
        ("fused_adam", "adam", True, False, 0.0),
        ("distributed_fused_adam", "adam", True, True, 0.0),
        ("sgd", "sgd", True, False, 0.0),
    ],
)
def test_optimizers_by_torchs_and_nemos_names(name, kind, decoupled, distributed, weight_decay):
    for optim in (read(optimizer={"name": name, "kwargs": {"lr": 1.0}}).optim, read(model(optim={"name": name})).optim):
        assert (optim.name, optim.distributed, optim.weight_decay) == (kind, distributed, weight_decay)
        assert optim.decoupled_weight_decay == decoupled


def test_what_an_optimizer_keeps_of_each_weight():
    assert read().optim.moment_names == ("exp_avg", "exp_avg_sq")
    plain, heavy = ({"name": "sgd", "kwargs": {"momentum": momentum}} for momentum in (0.0, 0.9))
    assert read(optimizer=plain).optim.moment_names == ()
    assert read(optimizer=heavy).optim.moment_names == ("momentum_buffer",)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"name": "adam_8bit_bnb"}, "Unknown optimizer 'adam_8bit_bnb'.*distributed_fused_adam"),
        ({"kwargs": {"betas": [0.9]}}, r"optimizer.kwargs.betas must be two numbers, 0 <= number < 1, got \[0.9\]"),
        ({"kwargs": {"lr": "fast"}}, "optimizer.kwargs.lr must be a number"),
        ({"kwargs": {"learning_rate": 1}}, "'optimizer.kwargs.learning_rate': write optimizer.kwargs.lr instead"),
    ],
)
def test_a_wrong_optimizer_says_what_to_write(optimizer, words):
    with pytest.raises(ConfigError, match=words):
        read(optimizer=optimizer)


# The file


FILE = """
model:
  num_layers: 2
  hidden_size: 6
  num_attention_heads: ${.num_layers}
  ffn_hidden_size: ${multiply:4, ${.hidden_size}}
  encoder_seq_length: 7
  data:
    seq_length: ${model.encoder_seq_length}
"""


def test_a_file_is_read_with_interpolations_and_multiplication(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(FILE)
    decoder = read(str(file)).decoder
    assert (decoder.num_attention_heads, decoder.ffn_hidden_size, decoder.kv_channels) == (2, 24, 3)
    assert decoder.vocab_size is None


def test_a_mapping_an_omegaconf_config_and_a_presets_name_are_read_alike():
    written = OmegaConf.to_container(megatron_preset("megatron_20b"), resolve=True)
    sources = [written, default_nemo_20b_config(), "megatron_20b", "megatron_20b.yaml"]
    first, *others = (read(source) for source in sources)
    assert all(other == first for other in others) and first.decoder.ffn_hidden_size == 24576


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("megatron_20", "Unknown preset 'megatron_20'. Did you mean 'megatron_20b'"),
        ("no/such/megatron_20b.yaml", "no file megatron_20b.yaml in .*/no/such, and that folder does not exist"),
        ("megatron_7b.yaml", f"There is no file megatron_7b.yaml in {Path.cwd()}$"),
        ({"model": {"num_layers": "${.layers}"}}, "train.trainer_kwargs.megatron_cfg: Interpolation key '.?layers'"),
        ({"modl": {}}, "Unknown key 'megatron_cfg.modl'. Did you mean 'model'\\?"),
        ({"optim": {}}, "Unknown key 'megatron_cfg.optim'. Did you mean 'model.optim'"),
        ({"model": 3}, "megatron_cfg.model must be a mapping of settings, got 3"),
        (model(num_layer=3), "Unknown key 'megatron_cfg.model.num_layer'. Did you mean 'model.num_layers'"),
        (model(num_layers=2.5, hidden_size=4, num_attention_heads=2), "model.num_layers must be a whole number"),
        (model(sequence_parallel="yes"), "megatron_cfg.model.sequence_parallel must be true or false, got 'yes'"),
        ({"trainer": {"precision": 64}}, "trainer.precision: unknown value '64'.*Known: 32, .*bf16-mixed"),
        (model(fp8=True), "model.fp8 is True, which trlx does not support: write trainer.precision: bf16"),
        ({"trainer": {"accumulate_grad_batches": 4}}, "accumulate_grad_batches is 4.*write train.minibatch_size"),
        ({"restore_from_path": "x.nemo"}, "restore_from_path is 'x.nemo'.*train.trainer_kwargs.pretrained_model"),
    ],
)
def test_a_wrong_file_says_what_to_write(source, words):
    with pytest.raises(ValueError, match=words):
        read(source)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"train": {"trainer_kwargs": {"megatron_config": "x"}}},
            "trainer_kwargs.megatron_config'. Did you mean 'mega",
        ),
        (
            {"train": {"trainer_kwargs": {"tensor_model_parallel_size": 0}}},
            "trainer_kwargs.tensor_model_parallel_size m",
        ),
        ({"model": {"model_arch_type": "seq2seq"}}, "model_arch_type is 'seq2seq'; the NeMo trainers cannot"),
        (
            {"model": {"peft_config": {"peft_type": "LORA"}}},
            "peft_config asks for an adapter; the NeMo trainers cannot",
        ),
        ({"train": {"compile": True}}, "train.compile is true; the NeMo trainers cannot"),
        ({"train": {"packing": True}}, "train.packing is on; the NeMo trainers cannot"),
    ],
)
def test_what_the_config_asks_in_vain_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        settings_of(bare(**changes))


def test_the_settings_do_not_need_the_engine():
    block = "import sys; sys.modules['megatron'] = None; import trlx.backends.megatron.settings"
    subprocess.run([sys.executable, "-c", block], check=True, cwd=ROOT)


# The model that a file describes


def decoder_of(**keys):
    return read_decoder(Lookup({**SMALL, **keys}, "megatron_cfg.model"))


def test_a_file_without_sizes_describes_no_model_and_one_with_some_is_refused():
    assert read(model(hidden_dropout=0.2)).decoder is None and read(model(hidden_dropout=0.2)).hidden_dropout == 0.2
    with pytest.raises(ConfigError, match="Missing: megatron_cfg.model.hidden_size, .*num_attention_heads"):
        read(model(num_layers=2))


def test_what_a_file_leaves_out_is_as_in_nemo():
    decoder = decoder_of()
    assert (decoder.ffn_hidden_size, decoder.kv_channels, decoder.num_query_groups) == (256, 8, 8)
    assert (decoder.normalization, decoder.norm_epsilon, decoder.norm_offset) == ("layernorm", 1e-5, 0.0)
    assert (decoder.activation, decoder.gated, decoder.bias, decoder.qkv_bias) == ("gelu_tanh", False, True, True)
    assert (decoder.position, decoder.tied, decoder.hidden_dropout, decoder.attention_dropout) == (
        "learned",
        True,
        0.1,
        0.1,
    )


def test_a_llama_is_described():
    keys = {"normalization": "rmsnorm", "layernorm_epsilon": 1e-6, "bias": False, "activation": "swiglu"}
    rope = {"position_embedding_type": "rope", "rotary_percentage": 1, "share_embeddings_and_output_weights": False}
    decoder = decoder_of(**keys, **rope, num_query_groups=2, hidden_dropout=0.0)
    assert (decoder.normalization, decoder.norm_epsilon, decoder.bias, decoder.qkv_bias) == (
        "rmsnorm",
        1e-6,
        False,
        False,
    )
    assert (decoder.activation, decoder.gated, decoder.num_query_groups) == ("silu", True, 2)
    assert (decoder.position, decoder.rotary_percentage, decoder.tied, decoder.hidden_dropout) == (
        "rope",
        1.0,
        False,
        0.0,
    )


@pytest.mark.parametrize(
    ("keys", "activation", "gated"),
    [
        ({"bias_activation_fusion": False}, "gelu", False),
        ({"bias_activation_fusion": False, "openai_gelu": True}, "gelu_tanh", False),
        ({"bias": False}, "gelu", False),
        ({"activation": "geglu"}, "gelu", True),
        ({"activation": "fast-reglu"}, "relu", True),
        ({"activation": "fast-swiglu", "bias": False}, "silu", True),
        ({"activation": "relu"}, "relu", False),
    ],
)
def test_activations_by_nemos_names(keys, activation, gated):
    assert (decoder_of(**keys).activation, decoder_of(**keys).gated) == (activation, gated)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"activation": "squared-relu"}, "activation: unknown value 'squared-relu'"),
        ({"position_embedding_type": "alibi"}, "unknown value 'alibi'.*Known: learned_absolute, rope"),
        ({"num_attention_heads": 7}, "hidden_size 64 is not a multiple of num_attention_heads 7: write kv_channels"),
        ({"rotary_percentage": 0}, "rotary_percentage must be more than 0 and at most 1, got 0"),
        ({"hidden_dropout": 1}, "hidden_dropout must be a number, 0 <= number < 1, got 1"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        decoder_of(**keys)


def test_where_weights_come_from():
    assert read(trainer_kwargs={"pretrained_model": "a.nemo"}).pretrained_model == "a.nemo"
    assert read(model(**SMALL), trainer_kwargs={"pretrained_model": Path("a")}).pretrained_model == "a"
    assert read(model(**SMALL)).pretrained_model is None
    assert read().pretrained_model == "lvwerra/gpt2-imdb"
