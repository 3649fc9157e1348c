"""Hugging Face configurations as shapes of the Megatron engine, and back."""

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.families import FAMILIES, decoder_config_of, hf_config_of

SPECIAL = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
PLAIN = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=8,
    intermediate_size=48,
    max_position_embeddings=32,
    **SPECIAL,
)
GROUPED = dict(PLAIN, num_key_value_heads=4)
LLAMA3 = dict(rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
STRETCHED = dict(LLAMA3, rope_type="llama3", original_max_position_embeddings=8192)
GPT2 = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=8, n_positions=32, **SPECIAL)

CONFIGS = {
    "gpt2": hf.GPT2Config(**GPT2, n_inner=48),
    "gpt2 untied": hf.GPT2Config(**GPT2, activation_function="relu", tie_word_embeddings=False),
    "gpt_neox": hf.GPTNeoXConfig(**dict(PLAIN, num_attention_heads=4), rotary_pct=0.25),
    "gpt_neox in sequence": hf.GPTNeoXConfig(
        **dict(PLAIN, num_attention_heads=4), rotary_pct=1.0, use_parallel_residual=False, tie_word_embeddings=True
    ),
    "llama": hf.LlamaConfig(**GROUPED),
    "llama with biases": hf.LlamaConfig(
        **dict(GROUPED, max_position_embeddings=16384),
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters=STRETCHED,
    ),
    "mistral": hf.MistralConfig(**GROUPED, sliding_window=16, head_dim=16),
    "qwen2": hf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen2 windowed": hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": hf.GemmaConfig(**GROUPED, head_dim=8),
}


def random_model(config, seed=0):
    """A model in which every weight matters, norms and biases too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def logits_of(model, rows=2, columns=12):
    tokens = torch.randint(3, 61, (rows, columns), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens).logits


def test_the_shape_of_gpt2_small():
    assert decoder_config_of(hf.GPT2Config(resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.3)) == DecoderConfig(
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        num_query_groups=12,
        kv_channels=64,
        max_position_embeddings=1024,
        vocab_size=50257,
        activation="gelu_tanh",
        tied=True,
        hidden_dropout=0.2,
        embedding_dropout=0.1,
        attention_dropout=0.3,
    )


def test_the_shape_of_pythia():
    decoder = decoder_config_of(CONFIGS["gpt_neox"])
    assert (decoder.parallel_residual, decoder.rotary_percentage, decoder.activation) == (True, 0.25, "gelu")
    assert (decoder.bias, decoder.qkv_bias, decoder.normalization, decoder.gated) == (True, True, "layernorm", False)


def test_the_shape_of_a_stretched_llama_with_biases():
    decoder = decoder_config_of(CONFIGS["llama with biases"])
    assert (decoder.rotary_scaling, decoder.rotary_base, decoder.num_query_groups) == (8.0, 5e5, 4)
    assert (decoder.bias, decoder.qkv_bias, decoder.tied, decoder.gated) == (True, True, True, True)
    assert (decoder.normalization, decoder.norm_epsilon, decoder.activation) == ("rmsnorm", 1e-6, "silu")


def test_the_shape_of_gemma():
    decoder = decoder_config_of(hf.GemmaConfig(**dict(GROUPED, hidden_size=64), head_dim=16))
    assert (decoder.norm_offset, decoder.embedding_scale, decoder.kv_channels) == (1.0, 8.0, 16)
    assert (decoder.activation, decoder.gated, decoder.tied) == ("gelu_tanh", True, True)


def test_queries_and_keys_are_normalised_in_qwen3_and_biased_in_qwen2():
    qwen2, qwen3 = decoder_config_of(CONFIGS["qwen2"]), decoder_config_of(CONFIGS["qwen3"])
    assert (qwen2.qk_norm, qwen2.qkv_bias, qwen2.bias) == (False, True, False)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.bias) == (True, False, False)


def test_the_window_of_attention_is_that_of_the_layers_that_have_one():
    windows = {name: decoder_config_of(config).attention_window for name, config in CONFIGS.items()}
    assert windows["mistral"] == 16 and windows["qwen2 windowed"] == 20
    assert windows["qwen2"] is None and windows["llama"] is None
    above = hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=20, max_window_layers=2)
    assert decoder_config_of(above).attention_window is None


def test_every_family_has_a_configuration_here():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_written_from_a_shape_computes_the_same(name):
    config = CONFIGS[name]
    written = hf_config_of(decoder_config_of(config))
    assert written.model_type == config.model_type
    assert written.architectures == [type(random_model(config)).__name__]
    model = random_model(config)
    again = AutoModelForCausalLM.from_config(written).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (hf.GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True: it must be False"),
        (hf.GPT2Config(scale_attn_weights=False), "scale_attn_weights False: it must be True"),
        (hf.GPT2Config(reorder_and_upcast_attn=True), "reorder_and_upcast_attn True"),
        (hf.GPT2Config(activation_function="quick_gelu"), "activation_function 'quick_gelu'.*gelu, gelu_new"),
        (hf.GPTNeoXConfig(attention_bias=False), "attention_bias False: it must be True"),
        (hf.LlamaConfig(attention_bias=True), "attention_bias True: it must equal mlp_bias False"),
        (
            hf.LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'linear'",
        ),
        (
            hf.LlamaConfig(
                max_position_embeddings=9000, rope_parameters=dict(STRETCHED, original_max_position_embeddings=4096)
            ),
            "original_max_position_embeddings 4096: it must be 8192",
        ),
        (
            hf.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor 0.5",
        ),
        (hf.LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
        (hf.Qwen3Config(attention_bias=True), "attention_bias True: it must be False"),
        (hf.GemmaConfig(use_bidirectional_attention=True), "use_bidirectional_attention True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_engine_would_compute_differently_is_refused(config, said):
    with pytest.raises(ValueError, match=f"does not support {config.model_type} models with .*{said}"):
        decoder_config_of(config)


@pytest.mark.parametrize("config", [hf.Gemma2Config(), hf.MixtralConfig(), hf.OPTConfig()], ids=lambda c: c.model_type)
def test_an_unknown_architecture_is_refused_with_those_that_are_known(config):
    with pytest.raises(
        ValueError, match=f"'{config.model_type}': use one of gpt2, gpt_neox, llama, mistral.*Accelerate"
    ):
        decoder_config_of(config)


def test_a_shape_that_no_family_has_cannot_be_written():
    decoder = DecoderConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=8,
        max_position_embeddings=32,
        vocab_size=61,
        position="rope",
        activation="silu",
        gated=True,
        bias=False,
    )
    with pytest.raises(ValueError, match="gpt2: gated, bias, position would differ; gpt_neox: .*gemma: "):
        hf_config_of(decoder)
    with pytest.raises(ValueError, match="mistral: normalization, qkv_bias would differ$"):
        hf_config_of(decoder, "mistral")
    with pytest.raises(ValueError, match="does not support the architecture 'opt'"):
        hf_config_of(decoder, "opt")
