"""Tiny models, and the archives that NeMo wrote of such before Megatron-Core, put together by hand."""

import torch
from transformers import GPT2Config, LlamaConfig

from tests.unit.test_megatron_families import random_model
from trlx.backends.megatron.families import decoder_config_of
from trlx.backends.megatron.mapping import entries
from trlx.backends.megatron.nemo.weights import write_nemo
from trlx.backends.megatron.weights import checked_reader, open_tensors

SIZES = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "ffn_hidden_size": 12}
LLAMA = {
    **SIZES,
    "max_position_embeddings": 16,
    "normalization": "rmsnorm",
    "layernorm_epsilon": 1e-6,
    "activation": "swiglu",
    "bias": False,
    "bias_activation_fusion": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
GPT = {**SIZES, "max_position_embeddings": 16, "share_embeddings_and_output_weights": True}


def llama():
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=4, intermediate_size=12, vocab_size=6)
    return random_model(LlamaConfig(**sizes, max_position_embeddings=16))


def gpt2():
    return random_model(GPT2Config(n_embd=8, n_layer=2, n_head=4, n_inner=12, vocab_size=6, n_positions=16))


def same_weights(found, model):
    """Whether every weight of a model in transformers is read from an archive to the last bit."""
    read = checked_reader(found.tensors, entries(found.decoder, found.family))
    state = {name: tensor for name, tensor in model.state_dict().items() if name in set(found.tensors.names())}
    return len(state) == len(list(found.tensors.names())) and all(torch.equal(read(n)[:], t) for n, t in state.items())


def written(path, model, tensor=1, pipeline=1, **kwargs):
    decoder = decoder_config_of(model.config)
    read = checked_reader(open_tensors(model), entries(decoder, model.config.model_type))
    write_nemo(path, decoder, read, model.config.model_type, tensor=tensor, pipeline=pipeline, **kwargs)
    return path


def split(tensor, dim, rank, size):
    return tensor.chunk(size, dim)[rank].clone()


def heads_first(q, k, v, rank, size, legacy):
    """Rows of a tensor rank by head (query, key, value of each), or, in old archives, by kind."""
    shards = [split(each, 0, rank, size) for each in (q, k, v)]
    if legacy:
        return torch.cat(shards)
    return torch.cat([shard.chunk(4 // size)[head] for head in range(4 // size) for shard in shards])


def older_llama(model, tensor=2, pipeline=2, legacy=False, prefix="model.", fused=False):
    """What NeMo wrote before Megatron-Core, put together without any code of the library."""
    state, ranks = model.state_dict(), {}
    per_stage = 2 // pipeline
    for t in range(tensor):
        for p in range(pipeline):
            base, found = f"{prefix}language_model.", {}
            for layer in range(per_stage):
                hf, own = f"model.layers.{p * per_stage + layer}.", f"{base}encoder.layers.{layer}."
                qkv = [state[f"{hf}self_attn.{kind}_proj.weight"] for kind in "qkv"]
                found[f"{own}self_attention.query_key_value.weight"] = heads_first(*qkv, t, tensor, legacy)
                found[f"{own}self_attention.dense.weight"] = split(state[f"{hf}self_attn.o_proj.weight"], 1, t, tensor)
                gate, up = (split(state[f"{hf}mlp.{kind}_proj.weight"], 0, t, tensor) for kind in ("gate", "up"))
                if fused:
                    found[f"{own}mlp.dense_h_to_4h.weight"] = torch.cat([gate, up])
                else:
                    found[f"{own}mlp.dense_h_to_4h.weight"] = gate
                    found[f"{own}mlp.dense_h_to_4h_2.weight"] = up
                found[f"{own}mlp.dense_4h_to_h.weight"] = split(state[f"{hf}mlp.down_proj.weight"], 1, t, tensor)
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    found[f"{own}{norm}.weight"] = state[f"{hf}{norm}.weight"]
                    if legacy:  # the converter wrote biases that nothing uses
                        found[f"{own}{norm}.bias"] = torch.zeros(8)
                found[f"{own}self_attention.rotary_pos_emb.inv_freq"] = torch.ones(1)
            if p == 0:
                rows = torch.cat([state["model.embed_tokens.weight"], torch.full((2, 8), 9.0)])
                found[f"{base}embedding.word_embeddings.weight"] = split(rows, 0, t, tensor)
            if p == pipeline - 1:
                found[f"{base}encoder.final_layernorm.weight"] = state["model.norm.weight"]
                rows = torch.cat([state["lm_head.weight"], torch.full((2, 8), 9.0)])
                found[f"{base}output_layer.weight"] = split(rows, 0, t, tensor)
            ranks[t, p] = found
    return ranks


def older_gpt(model, prefix="model."):
    """A tied GPT on two pipeline stages in NeMo's layout before Megatron-Core."""
    state, ranks = model.state_dict(), {}
    names = {"attn.c_proj": "self_attention.dense", "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}
    base = f"{prefix}language_model."
    for p in range(2):
        hf, own = f"transformer.h.{p}.", f"{base}encoder.layers.0."
        found = {}
        for theirs, ours in names.items():
            found[f"{own}{ours}.weight"] = state[f"{hf}{theirs}.weight"].T.clone()
            found[f"{own}{ours}.bias"] = state[f"{hf}{theirs}.bias"]
        for kind in ("weight", "bias"):
            q, k, v = state[f"{hf}attn.c_attn.{kind}"].chunk(3, -1)
            found[f"{own}self_attention.query_key_value.{kind}"] = heads_first(
                *((q, k, v) if kind == "bias" else (q.T, k.T, v.T)), 0, 1, False
            )
            found[f"{own}input_layernorm.{kind}"] = state[f"{hf}ln_1.{kind}"]
            found[f"{own}post_attention_layernorm.{kind}"] = state[f"{hf}ln_2.{kind}"]
            if p == 1:
                found[f"{base}encoder.final_layernorm.{kind}"] = state[f"transformer.ln_f.{kind}"]
        ranks[0, p] = found
    ranks[0, 0][f"{base}embedding.word_embeddings.weight"] = state["transformer.wte.weight"]
    ranks[0, 0][f"{base}embedding.position_embeddings.weight"] = state["transformer.wpe.weight"]
    ranks[0, 1][f"{prefix}word_embeddings.weight"] = state["transformer.wte.weight"].clone()
    return ranks
