"""Hugging Face weights as those of the Megatron engine: every rank's part, and back to the same bits."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.unit.test_megatron_families import CONFIGS, logits_of, random_model
from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.families import decoder_config_of
from trlx.backends.megatron.mapping import MEGATRON, Columns, Projection, Rows, Vocabulary, entries, padded_vocab
from trlx.backends.megatron.weights import ShardWriter, load_weights, open_tensors, write_index
from trlx.trainer.nemo import megatron_backend

DIVISOR = 32


def reader(**tensors):
    return {name: torch.tensor(values) for name, values in tensors.items()}.__getitem__


def of_config(config, vocab_rows=None):
    return entries(decoder_config_of(config), config.model_type, vocab_rows)


def split(found, read, size):
    return {name: [entry.shard(read, rank, size) for rank in range(size)] for name, entry in found.items()}


def joined(found, shards):
    whole = {}
    for name, entry in found.items():
        whole |= entry.whole(shards[name])
    return whole


# 4 heads in 2 groups, heads of one row: the engine has (two queries, a key, a value) of a group, then the next
QKV = Rows((Projection("q", 4), Projection("k", 2), Projection("v", 2)), None, blocks=2)


def test_queries_keys_and_values_are_kept_group_by_group():
    read = reader(q=[0, 1, 2, 3], k=[10, 11], v=[20, 21])
    assert QKV.shard(read, 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert QKV.shard(read, 1, 2).tolist() == [2, 3, 11, 21]


def test_queries_keys_and_values_come_apart_again():
    whole = QKV.whole([torch.tensor([0, 1, 10, 20]), torch.tensor([2, 3, 11, 21])])
    assert {name: tensor.tolist() for name, tensor in whole.items()} == {
        "q": [0, 1, 2, 3],
        "k": [10, 11],
        "v": [20, 21],
    }


def test_one_turned_matrix_holds_queries_keys_and_values_side_by_side():
    # 2 heads of one row, 2 inputs: columns of the tensor are q0 q1 k0 k1 v0 v1
    entry = Rows((Projection("c", 2),) * 3, 2, blocks=2, transposed=True)
    read = reader(c=[[0, 1, 10, 11, 20, 21], [5, 6, 15, 16, 25, 26]])
    assert entry.hf_shapes == {"c": (2, 6)}
    assert entry.shard(read, 1, 2).tolist() == [[1, 6], [11, 16], [21, 26]]
    assert torch.equal(entry.whole([entry.shard(read, rank, 2) for rank in range(2)])["c"], read("c"))


def test_gate_stands_over_up_on_every_rank():
    entry = Rows((Projection("gate", 4), Projection("up", 4)), None)
    read = reader(gate=[0, 1, 2, 3], up=[10, 11, 12, 13])
    assert entry.shard(read, 0, 1).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert [entry.shard(read, rank, 2).tolist() for rank in range(2)] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_the_vocabulary_is_filled_up_with_zeros_which_do_not_come_back():
    entry = Vocabulary("e", tokens=3, width=1, rows=padded_vocab(3, 8))
    shards = [entry.shard(reader(e=[[7], [8], [9]]), rank, 4) for rank in range(4)]
    assert [shard.flatten().tolist() for shard in shards] == [[7, 8], [9, 0], [0, 0], [0, 0]]
    assert entry.whole(shards)["e"].tolist() == [[7], [8], [9]]
    assert [padded_vocab(8, 8), padded_vocab(9, 8)] == [8, 16]


def test_a_turned_matrix_split_by_columns():
    entry = Columns("c", (1, 4), transposed=True)
    read = reader(c=[[1], [2], [3], [4]])
    assert [entry.shard(read, rank, 2).tolist() for rank in range(2)] == [[[1, 2]], [[3, 4]]]
    assert entry.whole([torch.tensor([[1, 2]]), torch.tensor([[3, 4]])])["c"].tolist() == [[1], [2], [3], [4]]


def test_what_cannot_be_divided_evenly_is_refused_by_name():
    with pytest.raises(ValueError, match="The 2 head groups of q cannot be divided evenly by 4"):
        QKV.shard(reader(q=[0] * 4, k=[0] * 2, v=[0] * 2), 0, 4)
    with pytest.raises(ValueError, match="The 3 inputs of c cannot be divided evenly by 2"):
        Columns("c", (1, 3)).shard(reader(c=[[0, 1, 2]]), 0, 2)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_over_any_number_of_tensor_ranks_and_back_the_bits_are_the_same(tmp_path, name, size):
    random_model(CONFIGS[name]).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = of_config(CONFIGS[name], padded_vocab(61, DIVISOR * size))
    whole = joined(found, split(found, open_tensors(tmp_path).read, size))
    assert whole.keys() == stored.keys()
    assert all(torch.equal(whole[each], stored[each]) and whole[each].is_contiguous() for each in stored)


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_of_two_ranks_become_parts_of_four_under_the_engines_own_names(name):
    # an optimizer's moments go the same way, in whichever type they are
    model = random_model(CONFIGS[name]).bfloat16().state_dict()
    model.setdefault("embed_out.weight", model["lm_head.weight"])
    decoder = decoder_config_of(CONFIGS[name])
    by_family, by_engine = of_config(CONFIGS[name], 64), entries(decoder, MEGATRON, 64)
    whole = joined(by_engine, split(by_family, model.__getitem__, 2))
    expected = split(by_family, model.__getitem__, 4)
    for each, shards in split(by_engine, whole.__getitem__, 4).items():
        assert all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in zip(shards, expected[each], strict=True))


def test_a_rank_reads_only_its_part(tmp_path):
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    source = open_tensors(tmp_path)
    for entry in of_config(CONFIGS["llama"], 64).values():
        seen = []
        shard = entry.shard(lambda name, seen=seen: Watched(source.read(name), seen), 1, 4)
        assert sum(seen) == shard.numel()


class Watched:
    def __init__(self, tensor, seen):
        self.tensor, self.seen = tensor, seen

    def __getitem__(self, index):
        self.seen.append(self.tensor[index].numel())
        return self.tensor[index]


def test_a_part_does_not_share_memory_with_the_source():
    model = random_model(CONFIGS["gpt2"]).state_dict()
    shards = split(of_config(CONFIGS["gpt2"]), model.__getitem__, 1)
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.values()}
    assert not any(shard.untyped_storage().data_ptr() in storages for each in shards.values() for shard in each)


def test_a_family_without_names_for_a_shape_is_refused():
    gated = decoder_config_of(CONFIGS["llama"])
    with pytest.raises(ValueError, match="gpt2 has no gated feed-forward blocks"):
        entries(gated, "gpt2")
    with pytest.raises(ValueError, match="gpt_neox has no learned positions"):
        entries(decoder_config_of(CONFIGS["gpt2"]), "gpt_neox")
    with pytest.raises(ValueError, match="no weight names for 'opt'; known are gpt2"):
        entries(gated, "opt")


@pytest.fixture(scope="module")
def engine():
    """Megatron-Core with one process."""
    if find_spec("megatron") is None:
        pytest.skip('megatron-core is not installed: pip install "trlx[nemo]"')
    if torch.cuda.is_available():
        pytest.skip("compares with numbers of the CPU, but with a GPU the engine runs there")
    import torch.distributed as dist

    megatron_backend()
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def stock_model(decoder: DecoderConfig, rows: int):
    """Megatron-Core's own decoder of this shape."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    megatron_backend()  # pytest forgets after each test what is not warned of
    gelu = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.functional.silu, "relu": nn.functional.relu}
    normalization = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[decoder.normalization]
    config = TransformerConfig(
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        ffn_hidden_size=decoder.ffn_hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        num_query_groups=decoder.num_query_groups,
        kv_channels=decoder.kv_channels,
        normalization=normalization,
        layernorm_epsilon=decoder.norm_epsilon,
        activation_func=gelu[decoder.activation],
        gated_linear_unit=decoder.gated,
        add_bias_linear=decoder.bias,
        add_qkv_bias=decoder.qkv_bias,
        qk_layernorm=decoder.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        cuda_graph_scope=[],
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=decoder.qk_norm, normalization=normalization),
        vocab_size=rows,
        max_sequence_length=decoder.max_position_embeddings,
        share_embeddings_and_output_weights=decoder.tied,
        position_embedding_type={"learned": "learned_absolute", "rope": "rope"}[decoder.position],
        rotary_percent=decoder.rotary_percentage,
        rotary_base=decoder.rotary_base,
        rope_scaling=decoder.rotary_scaling is not None,
        rope_scaling_factor=decoder.rotary_scaling or 1.0,
    ).eval()


# the stock model has neither parallel residuals nor norms with an offset
STOCK = [name for name in CONFIGS if name not in ("gpt_neox", "gemma")]


@pytest.mark.parametrize("name", STOCK)
def test_the_engine_computes_the_logits_of_transformers(engine, name):
    model, decoder = random_model(CONFIGS[name]), decoder_config_of(CONFIGS[name])
    rows, tokens = padded_vocab(61, DIVISOR), torch.randint(3, 61, (2, 12))
    decoder = stock_model(decoder, rows)
    load_weights(decoder.named_parameters(), of_config(CONFIGS[name], rows), open_tensors(model))
    hidden = torch.ones(12, 12).triu(1).bool()[None, None]
    with torch.no_grad():
        got = decoder(tokens, torch.arange(12).expand(2, 12), hidden)[..., :61]
        expected = model(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STOCK)
def test_the_entries_are_the_weights_of_the_engine(engine, name):
    decoder = decoder_config_of(CONFIGS[name])
    of_engine = {each for each, _ in stock_model(decoder, 64).named_parameters()}
    assert of_engine | ({"output_layer.weight"} if decoder.tied else set()) == set(of_config(CONFIGS[name], 64))


def parameters_of(config):
    found = of_config(config)
    ones = {n: torch.ones(entry.hf_shapes[n]) for entry in found.values() for n in entry.hf_names}
    return {name: torch.zeros_like(entry.shard(ones.__getitem__, 0, 1)) for name, entry in found.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_files_in_shards_and_the_model_in_memory_give_the_same_weights(tmp_path, name):
    model, found = random_model(CONFIGS[name]), of_config(CONFIGS[name])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    from_files, from_memory = parameters_of(CONFIGS[name]), parameters_of(CONFIGS[name])
    load_weights(from_files.items(), found, open_tensors(tmp_path))
    load_weights(from_memory.items(), found, open_tensors(model))
    assert all(torch.equal(from_files[each], from_memory[each]) and from_files[each].any() for each in found)


def test_weights_become_the_type_of_the_parameter(tmp_path):
    random_model(CONFIGS["llama"]).half().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    parameter = torch.zeros(32)
    load_weights([("decoder.final_layernorm.weight", parameter)], of_config(CONFIGS["llama"]), open_tensors(tmp_path))
    assert stored.dtype == torch.float16 and parameter.dtype == torch.float32
    assert torch.equal(parameter, stored.float())


def rewritten(folder, name, change):
    """Saves a model of that family with its stored tensors changed; returns a call that loads it."""
    random_model(CONFIGS[name]).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    parameters = parameters_of(CONFIGS[name])
    load_weights(parameters.items(), of_config(CONFIGS[name]), open_tensors(folder))
    return parameters


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no model.layers.1.mlp.up_proj.weight, which a model of this config"):
        rewritten(tmp_path, "llama", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.layers.0.self_attn.q_proj.bias"), ("gpt2", "transformer.h.2.attn.c_attn.bias")],
)
def test_a_tensor_that_would_not_be_used_is_named(tmp_path, family, name):
    with pytest.raises(ValueError, match=f"has {name}, which no model of this configuration uses"):
        rewritten(tmp_path, family, lambda tensors: tensors.update({name: torch.zeros(32)}))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model.norm.weight in .* is \[16\], but .* \[32\]"):
        rewritten(tmp_path, "llama", lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16)}))


def test_a_parameter_of_another_shape_or_name_is_refused():
    source, found = open_tensors(random_model(CONFIGS["gpt2"])), of_config(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match=r"fc2.weight is \[32, 48\] here, but rank 1 of 2 gets \[32, 24\] of .*c_proj"):
        load_weights([("decoder.layers.0.mlp.linear_fc2.weight", torch.zeros(32, 48))], found, source, 1, 2)
    with pytest.raises(ValueError, match="weight heads.value that no Hugging Face tensor belongs to"):
        load_weights([("heads.value", torch.zeros(1))], found, source)


def test_files_without_prefix_and_with_old_constants_are_understood(tmp_path):
    def as_on_the_hub(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)

    model = random_model(CONFIGS["gpt2"])
    got = rewritten(tmp_path, "gpt2", as_on_the_hub)
    assert torch.equal(got["embedding.position_embeddings.weight"], model.transformer.wpe.weight)


def test_the_head_of_a_tied_model_may_be_stored_if_it_is_the_embedding(tmp_path):
    name = "model.embed_tokens.weight"
    rewritten(tmp_path, "qwen2", lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    with pytest.raises(ValueError, match="lm_head.weight in .* is not model.embed_tokens.weight.*tie_word_embeddings"):
        rewritten(tmp_path, "qwen2", lambda tensors: tensors.update({"lm_head.weight": tensors[name] + 1}))


def test_the_head_of_neox_is_found_under_both_of_its_names(tmp_path):
    model = random_model(CONFIGS["gpt_neox"])
    got = rewritten(
        tmp_path, "gpt_neox", lambda tensors: tensors.update({"lm_head.weight": tensors.pop("embed_out.weight")})
    )
    assert torch.equal(got["output_layer.weight"], model.lm_head.weight)


def test_pickled_and_missing_weights_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="There are no weights in .*model.safetensors.*save_pretrained"):
        open_tensors(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="There are only pickled weights in .*save_pretrained"):
        open_tensors(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names model-1.safetensors, model-2.safetensors, but there is no such file"):
        open_tensors(tmp_path)


def test_what_is_neither_a_folder_nor_on_the_hub_is_refused(tmp_path):
    with pytest.raises(OSError, match="No model at .*nowhere': it is not a folder"):
        open_tensors(tmp_path / "nowhere")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_two_stages_write_loads_in_plain_transformers_with_the_same_logits(tmp_path, name):
    config, size = CONFIGS[name], 2
    model, found = random_model(config), of_config(config, padded_vocab(61, DIVISOR * size))
    shards = split(found, open_tensors(save(model, tmp_path / "before")).read, size)
    after = tmp_path / "after"
    after.mkdir()
    (after / "model.safetensors").write_bytes(b"of an earlier export")
    if config.tie_word_embeddings:
        del found["output_layer.weight"]
    written = []
    for stage in range(2):
        writer = ShardWriter(after, f"{stage:02d}", max_bytes=10_000)
        for each, entry in found.items():
            if stage_of(each) == stage:
                writer.add(entry.whole(shards[each]))
        written.append(writer.close())
    write_index(after, written)
    config.save_pretrained(after)

    loaded, about = AutoModelForCausalLM.from_pretrained(after, output_loading_info=True)
    assert not (about["missing_keys"] or about["unexpected_keys"] or about["mismatched_keys"])
    assert torch.equal(logits_of(loaded), logits_of(model))
    files = sorted(file.name for file in after.glob("*.safetensors"))
    assert files[0] == "model-00-00001.safetensors" and len(files) > 2 and files[-1].startswith("model-01-")
    with safe_open(after / files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it older loaders refuse the file
    total = sum(tensor.nbytes for file in files for tensor in load_file(after / file).values())
    assert json.loads((after / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == total


def stage_of(name):
    return int(name.startswith(("decoder.layers.1.", "decoder.final", "output_layer")))


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def test_a_tensor_that_two_stages_wrote_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="embedding was written twice, into model-0-00001.* and model-1-00001"):
        write_index(tmp_path, [written_alone(tmp_path, shard) for shard in "01"])


def written_alone(folder, shard):
    writer = ShardWriter(folder, shard)
    writer.add({"embedding": torch.ones(2)})
    return writer.close()
