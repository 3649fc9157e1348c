"""Models in `.nemo` archives: all forms of NeMo are read, and what is written comes back to the bit."""

import dataclasses
import logging
import tarfile

import pytest
import torch
import yaml

from tests.builders import UNPACK
from tests.unit.nemo_archives import (
    GPT,
    LLAMA,
    gpt2,
    heads_first,
    llama,
    older_gpt,
    older_llama,
    same_weights,
    split,
    written,
)
from tests.unit.test_megatron_families import CONFIGS, random_model
from trlx.backends.megatron.families import decoder_config_of, hf_config_of
from trlx.backends.megatron.mapping import entries
from trlx.backends.megatron.nemo.archive import opened, write_archive
from trlx.backends.megatron.nemo.config import read_config
from trlx.backends.megatron.nemo.file import read_megatron_cfg
from trlx.backends.megatron.nemo.weights import is_nemo, open_nemo, write_nemo
from trlx.backends.megatron.weights import load_weights
from trlx.launch.cli import main

SIZES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)]
KNOWN = [name for name in CONFIGS if name != "gpt_neox"]  # attention beside the feed-forward block: not in NeMo


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("name", KNOWN)
def test_a_model_written_for_any_number_of_ranks_comes_back_to_the_bit(tmp_path, name, sizes):
    model = random_model(CONFIGS[name])
    found = open_nemo(written(tmp_path / "m.nemo", model, *sizes))
    assert found.decoder == decoder_config_of(model.config)
    assert found.family == model.config.model_type
    assert same_weights(found, model)


def test_names_and_rows_of_an_archive_are_those_of_megatron_core(tmp_path):
    model = llama()
    with opened(written(tmp_path / "m.nemo", model, 2, 2)) as archive:
        assert archive.parallel_sizes() == (2, 2)
        shard = archive.weights(1, 1)
        config = archive.config
    state = model.state_dict()
    layer, hf = "model.decoder.layers.0.", "model.layers.1."
    gate, up = (split(state[f"{hf}mlp.{kind}_proj.weight"], 0, 1, 2) for kind in ("gate", "up"))
    qkv = [state[f"{hf}self_attn.{kind}_proj.weight"] for kind in "qkv"]
    expected = {
        f"{layer}self_attention.linear_qkv.layer_norm_weight": state[f"{hf}input_layernorm.weight"],
        f"{layer}self_attention.linear_qkv.weight": heads_first(*qkv, 1, 2, False),
        f"{layer}self_attention.linear_proj.weight": split(state[f"{hf}self_attn.o_proj.weight"], 1, 1, 2),
        f"{layer}mlp.linear_fc1.layer_norm_weight": state[f"{hf}post_attention_layernorm.weight"],
        f"{layer}mlp.linear_fc1.weight": torch.cat([gate, up]),
        f"{layer}mlp.linear_fc2.weight": split(state[f"{hf}mlp.down_proj.weight"], 1, 1, 2),
        "model.decoder.final_layernorm.weight": state["model.norm.weight"],
        "model.output_layer.weight": torch.zeros(128, 8),  # 6 tokens of 256 rows: all on the other rank
    }
    assert shard.keys() == expected.keys()
    assert all(torch.equal(shard[name], tensor) for name, tensor in expected.items())
    assert (config["padded_vocab_size"], config["vocab_size"], config["mcore_gpt"]) == (256, 6, True)
    assert config["target"] == "nemo.core.classes.modelPT.ModelPT"


@pytest.mark.parametrize("pipeline, names", [(1, []), (2, ["model.output_layer.weight"])])
def test_a_tied_head_is_written_only_where_another_stage_needs_a_copy(tmp_path, pipeline, names):
    with opened(written(tmp_path / "m.nemo", gpt2(), 1, pipeline)) as archive:
        shards = [archive.weights(0, p) for p in range(pipeline)]
    assert [name for shard in shards for name in shard if "output_layer" in name] == names


@pytest.mark.parametrize("prefix", ["model.", "model.module."])
@pytest.mark.parametrize("fused", [False, True])
def test_a_gated_model_from_before_megatron_core_is_read(tmp_path, prefix, fused):
    model = llama()
    config = LLAMA | {"activation": "fast-swiglu" if fused else "swiglu"}
    write_archive(tmp_path / "m.nemo", config, older_llama(model, prefix=prefix, fused=fused))
    found = open_nemo(tmp_path / "m.nemo", tokens=6)
    assert found.family == "llama" and found.decoder.vocab_size == 6
    assert same_weights(found, model)


@pytest.mark.parametrize("tensor", [1, 2])
def test_llama_as_the_original_library_converted_it_is_read(tmp_path, tensor):
    """Queries, keys and values stand one after the other on every rank; its file also has the training's sections."""
    model = llama()
    config = {"trainer": {"devices": 4}, "model": LLAMA | {"megatron_legacy": True}}
    write_archive(tmp_path / "m.nemo", config, older_llama(model, tensor, 1, legacy=True))
    assert same_weights(open_nemo(tmp_path / "m.nemo", tokens=6), model)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2)])
def test_a_folder_without_model_config_is_read_by_its_only_yaml_file_or_by_megatron_cfg(tmp_path, tensor, pipeline):
    """The original's converter wrote the weights of every rank and a file of the training beside them."""
    model, config = llama(), LLAMA | {"megatron_legacy": True}
    write_archive(tmp_path / "m.nemo", config, older_llama(model, tensor, pipeline, legacy=True))
    with tarfile.open(tmp_path / "m.nemo") as tar:
        tar.extractall(tmp_path / "folder", **UNPACK)
    (tmp_path / "folder" / "model_config.yaml").unlink()
    assert is_nemo(tmp_path / "folder")
    assert same_weights(open_nemo(tmp_path / "folder", tokens=6, changes=config), model)
    with pytest.raises(FileNotFoundError, match="has no model_config.yaml: it holds .*weights.ckpt"):
        open_nemo(tmp_path / "folder", tokens=6, changes={"sequence_parallel": True})
    training = {"trainer": {"devices": "${multiply:2, 2}"}, "model": config}
    (tmp_path / "folder" / "megatron_7b.yaml").write_text(yaml.safe_dump(training))
    assert same_weights(open_nemo(tmp_path / "folder", tokens=6), model)


def test_a_tied_gpt_from_before_megatron_core_is_read(tmp_path):
    model = gpt2()
    write_archive(tmp_path / "m.nemo", GPT | {"max_position_embeddings": 99}, older_gpt(model, "model.module."))
    found = open_nemo(tmp_path / "m.nemo")
    # gelu with a fused bias is the tanh form; the table says how many positions there are
    assert (found.family, found.decoder.activation, found.config.n_positions) == ("gpt2", "gelu_tanh", 16)
    assert same_weights(found, model)


def test_norms_are_read_under_the_names_with_and_without_transformer_engine(tmp_path):
    model = gpt2()
    with opened(written(tmp_path / "m.nemo", model)) as archive:
        config, weights = archive.config, archive.weights()
    local = {
        name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
            "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
        ): tensor
        for name, tensor in weights.items()
    }
    assert "model.decoder.layers.1.pre_mlp_layernorm.bias" in local
    write_archive(tmp_path / "local.nemo", config, {(0, 0): local})
    assert same_weights(open_nemo(tmp_path / "local.nemo"), model)


def test_an_unpacked_archive_is_read_as_well(tmp_path):
    model = llama()
    with tarfile.open(written(tmp_path / "m.nemo", model, 2)) as tar:
        tar.extractall(tmp_path / "folder", **UNPACK)
    assert is_nemo(tmp_path / "folder") and is_nemo(tmp_path / "m.nemo") and not is_nemo(tmp_path)
    assert same_weights(open_nemo(tmp_path / "folder"), model)


@pytest.mark.parametrize("said, tokens, kept", [(None, None, 8), (None, 6, 6), (6, 7, 6), (None, 99, 8)])
def test_rows_behind_the_last_token_are_cut_off(tmp_path, said, tokens, kept):
    config = LLAMA | {"vocab_size": said}
    write_archive(tmp_path / "m.nemo", config, older_llama(llama()))
    found = open_nemo(tmp_path / "m.nemo", tokens)
    assert found.decoder.vocab_size == kept
    assert found.tensors.read("lm_head.weight")[:].shape == (kept, 8)


def test_nothing_is_read_before_a_value_is_asked_for(tmp_path, monkeypatch):
    found = open_nemo(written(tmp_path / "m.nemo", llama(), 2, 2))
    reads = []
    monkeypatch.setattr(
        "trlx.backends.megatron.nemo.names.Shard.read", lambda shard, name, device="cpu": reads.append((name, device))
    )
    for name in found.tensors.names():
        assert found.tensors.read(name).get_shape()
    assert reads == []


def changed(tmp_path, change, config=None, made=None):
    """An archive of one rank after `change` was made to its weights."""
    ranks = made or older_llama(llama(), 1, 1)
    change(ranks)
    write_archive(tmp_path / "m.nemo", config or LLAMA, ranks)
    return tmp_path / "m.nemo"


def without(name):
    return lambda ranks: ranks[0, 0].pop(name)


def with_(name, tensor, rank=(0, 0)):
    return lambda ranks: ranks[rank].update({name: tensor})


LAYER = "model.language_model.encoder.layers.0."


@pytest.mark.parametrize(
    "change, message",
    [
        (without(f"{LAYER}self_attention.dense.weight"), r"has no decoder\.layers\.0\.self_attention\.linear_proj\.we"),
        (without("model.language_model.output_layer.weight"), r"has no output_layer\.weight"),
        (with_(f"{LAYER}mlp.router.weight", torch.ones(2)), r"layers\.0\.mlp\.router\.weight, which a model"),
        (with_(f"{LAYER}input_layernorm.bias", torch.ones(8)), r"input_layernorm\.bias, which a model"),
        (with_(f"{LAYER}input_layernorm.weight", torch.ones(9)), r"input_layernorm\.weight in .* is \[9\], .* \[8\]"),
        (with_(f"{LAYER}mlp.dense_h_to_4h_2.weight", torch.ones(3, 8)), r"is \[15, 8\], .* \[24, 8\]"),
        (with_(f"{LAYER}mlp.dense_h_to_4h_2.weight", torch.ones(3, 9)), r"does not fit its model_config\.yaml"),
        (without("model.language_model.embedding.word_embeddings.weight"), "not a GPT model of NeMo 1.x"),
        (lambda ranks: ranks[0, 0].update(third_layer()), r"has 3 layers, but .* num_layers 2"),
    ],
)
def test_an_archive_whose_weights_do_not_fit_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        open_nemo(changed(tmp_path, change))


def third_layer():
    return {LAYER.replace(".0.", ".2.") + "input_layernorm.weight": torch.ones(8)}


def test_a_copy_of_a_tied_embedding_that_is_none_is_refused(tmp_path):
    change = with_("model.word_embeddings.weight", torch.ones(6, 8), (0, 1))
    with pytest.raises(ValueError, match="share_embeddings_and_output_weights: set it to false"):
        open_nemo(changed(tmp_path, change, GPT, older_gpt(gpt2())))


def test_keys_that_nothing_reads_are_said_once(tmp_path, caplog):
    logging.getLogger("trlx").propagate = True
    config = LLAMA | {"my_scale": 3, "ub_tp_comm_overlap": False, "gc_interval": None, "optim": {"name": "adam"}}
    write_archive(tmp_path / "m.nemo", config, older_llama(llama()))
    with caplog.at_level(logging.WARNING):
        open_nemo(tmp_path / "m.nemo")
    said = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert len(said) == 1 and said[0].endswith("are not read: my_scale")


def test_a_shape_that_transformers_has_not_is_written_and_read_under_the_engines_names(tmp_path):
    sizes = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 2, "kv_channels": 4}
    preset = read_megatron_cfg("megatron_2b")["model"]
    decoder = dataclasses.replace(read_config(preset | sizes, "the preset"), vocab_size=7)
    with pytest.raises(ValueError, match="transformers has no architecture for this decoder"):
        hf_config_of(decoder)
    tensors = {
        name: torch.randn(size)
        for entry in entries(decoder, "megatron").values()
        for name, size in entry.hf_shapes.items()
    }
    write_nemo(tmp_path / "m.nemo", decoder, tensors.__getitem__, "megatron", tensor=2, pipeline=2)
    found = open_nemo(tmp_path / "m.nemo")
    assert (found.decoder, found.config, found.family) == (decoder, None, "megatron")
    assert all(torch.equal(found.tensors.read(name)[:], tensor) for name, tensor in tensors.items())
    with pytest.raises(SystemExit, match="transformers has no architecture for this decoder"):
        main(["convert", str(tmp_path / "m.nemo"), str(tmp_path / "hf")])
    assert not (tmp_path / "hf").exists()


def test_what_cannot_be_divided_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="2 layers cannot be divided evenly over 3 pipeline ranks"):
        written(tmp_path / "m.nemo", llama(), 1, 3)
    with pytest.raises(ValueError, match="cannot be divided evenly by 8"):
        written(tmp_path / "m.nemo", llama(), 8, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "names, tokenizer",
    [
        (["tokenizer.model"], {"library": "sentencepiece", "model": "nemo:tokenizer.model"}),
        (["vocab.json", "merges.txt"], {"type": "GPT2BPETokenizer", "merge_file": "nemo:merges.txt"}),
        ([], {"library": None}),
    ],
)
def test_the_config_names_the_tokenizers_files(tmp_path, names, tokenizer):
    written(tmp_path / "m.nemo", llama(), files=dict.fromkeys(names, b"x"))
    with opened(tmp_path / "m.nemo") as archive:
        assert archive.config["tokenizer"].items() >= tokenizer.items()


def test_an_archives_own_rows_fill_the_weights_of_a_rank(tmp_path):
    """The rows of padding depend on the parallel sizes; tokens do not."""
    model = llama()
    found = open_nemo(written(tmp_path / "m.nemo", model, 2, 2))
    shard = torch.empty(4, 8)
    load_weights([("embedding.word_embeddings.weight", shard)], entries(found.decoder, "llama", 8), found.tensors, 1, 2)
    assert torch.equal(shard[:2], model.state_dict()["model.embed_tokens.weight"][4:])
    assert shard[2:].tolist() == [[0.0] * 8] * 2


def test_the_written_config_is_plain_yaml(tmp_path):
    with tarfile.open(written(tmp_path / "m.nemo", gpt2())) as tar:
        config = yaml.safe_load(tar.extractfile("./model_config.yaml"))
    assert (config["num_layers"], config["activation"], config["openai_gelu"]) == (2, "gelu", True)
