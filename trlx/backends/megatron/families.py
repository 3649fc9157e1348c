"""Converts between Hugging Face configurations and `DecoderConfig`, for the supported families.

A configuration that Megatron-Core would compute differently is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from trlx.backends.megatron.decoder_config import DecoderConfig


def decoder_config_of(config: PretrainedConfig) -> DecoderConfig:
    """The decoder that a Hugging Face configuration describes.

    Raises:
        ValueError: the family is not in `FAMILIES`, or a field has a value that is not supported; the message names it.
    """
    family = _family(config.model_type)
    for name, wanted in family.fixed.items():
        got = getattr(config, name, wanted)
        if bool(got) != wanted:
            raise ValueError(_refusal(config, name, got, f"it must be {wanted}"))
    if getattr(config, "quantization_config", None):
        raise ValueError(_refusal(config, "quantization_config", "...", "name the model before it was quantized"))
    heads = config.num_attention_heads
    sizes = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": config.hidden_size // heads,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "tied": bool(config.tie_word_embeddings),
        "init_std": config.initializer_range,
    }
    return DecoderConfig(**{**sizes, **family.read(config)})


def hf_config_of(decoder: DecoderConfig, family: str | None = None) -> PretrainedConfig:
    """A Hugging Face configuration of this decoder, without special tokens.

    `family` None: the first of `FAMILIES` that can describe the decoder. Dropout and ``init_std`` are kept where the
    family has a field for them.

    Raises:
        ValueError: the family is unknown or cannot describe the decoder; the message names the fields that differ.
    """
    reasons = []
    for name in FAMILIES if family is None else [family]:
        config, reason = _written(decoder, name)
        if config is not None:
            return config
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"transformers has no architecture for this decoder. {'; '.join(reasons)}")


def find_hf_config(decoder: DecoderConfig) -> PretrainedConfig | None:
    """`hf_config_of`, or None if no family can describe the decoder."""
    try:
        return hf_config_of(decoder)
    except ValueError:
        return None


@dataclass(frozen=True)
class Family:
    """An architecture of transformers."""

    architecture: str
    read: Callable[[PretrainedConfig], dict[str, Any]]
    """From its configuration to the fields of `DecoderConfig` that families name differently."""
    write: Callable[[DecoderConfig], dict[str, Any]]
    """From a `DecoderConfig` to arguments of its configuration."""
    fixed: Mapping[str, bool]
    """Switches of its configuration, with the only supported value of each."""


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
"""transformers' name of an activation -> ours."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants of Llama-3's rotary scaling, which Megatron-Core fixes."""

TRAINING_ONLY = ("init_std", "hidden_dropout", "embedding_dropout", "attention_dropout")
"""Fields of `DecoderConfig` that do not change what a trained model computes."""


def _read_gpt2(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "ffn_hidden_size": config.n_inner or 4 * config.n_embd,
        "norm_epsilon": config.layer_norm_epsilon,
        "activation": _activation(config, "activation_function"),
        "hidden_dropout": config.resid_pdrop,
        "embedding_dropout": config.embd_pdrop,
        "attention_dropout": config.attn_pdrop,
    }


def _write_gpt2(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": decoder.vocab_size,
        "n_positions": decoder.max_position_embeddings,
        "n_embd": decoder.hidden_size,
        "n_layer": decoder.num_layers,
        "n_head": decoder.num_attention_heads,
        "n_inner": decoder.ffn_hidden_size,
        "activation_function": _hf_activation(decoder),
        "layer_norm_epsilon": decoder.norm_epsilon,
        "embd_pdrop": decoder.hidden_dropout if decoder.embedding_dropout is None else decoder.embedding_dropout,
        "resid_pdrop": decoder.hidden_dropout,
        "attn_pdrop": decoder.attention_dropout,
    }


def _read_neox(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "ffn_hidden_size": config.intermediate_size,
        "norm_epsilon": config.layer_norm_eps,
        "activation": _activation(config),
        "parallel_residual": config.use_parallel_residual,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        **_rotary(config),
    }


def _write_neox(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        **_sizes(decoder),
        "rope_parameters": _rope(decoder) | {"partial_rotary_factor": decoder.rotary_percentage},
        "layer_norm_eps": decoder.norm_epsilon,
        "use_parallel_residual": decoder.parallel_residual,
        "hidden_dropout": decoder.hidden_dropout,
    }


def _read_llama(config: PretrainedConfig) -> dict[str, Any]:
    if config.attention_bias != config.mlp_bias:
        must = f"it must equal mlp_bias {config.mlp_bias}"
        raise ValueError(_refusal(config, "attention_bias", config.attention_bias, must))
    return _read_rms(config) | {"bias": config.mlp_bias, "qkv_bias": config.attention_bias}


def _write_llama(decoder: DecoderConfig) -> dict[str, Any]:
    return _write_rms(decoder) | {"attention_bias": decoder.qkv_bias, "mlp_bias": decoder.bias}


def _read_mistral(config: PretrainedConfig) -> dict[str, Any]:
    return _read_rms(config) | {"attention_window": config.sliding_window}


def _write_mistral(decoder: DecoderConfig) -> dict[str, Any]:
    return _write_rms(decoder) | {"sliding_window": decoder.attention_window}


def _read_qwen2(config: PretrainedConfig) -> dict[str, Any]:
    return _read_rms(config) | {"qkv_bias": True, "attention_window": _window(config)}


def _write_qwen2(decoder: DecoderConfig) -> dict[str, Any]:
    return _write_rms(decoder) | {
        "use_sliding_window": decoder.attention_window is not None,
        "sliding_window": decoder.attention_window,
        "max_window_layers": 0 if decoder.attention_window else decoder.num_layers,
    }


def _read_qwen3(config: PretrainedConfig) -> dict[str, Any]:
    return _read_rms(config) | {"qk_norm": True, "attention_window": _window(config)}


def _read_gemma(config: PretrainedConfig) -> dict[str, Any]:
    return _read_rms(config) | {"norm_offset": 1.0, "embedding_scale": config.hidden_size**0.5}


def _read_rms(config: PretrainedConfig) -> dict[str, Any]:
    """Llama and its descendants: RMSNorm, rotary positions, gated feed-forward blocks, no biases."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": width,
        "ffn_hidden_size": config.intermediate_size,
        "normalization": "rmsnorm",
        "norm_epsilon": config.rms_norm_eps,
        "activation": _activation(config),
        "gated": True,
        "bias": False,
        "qkv_bias": False,
        "attention_dropout": config.attention_dropout,
        **_rotary(config),
    }


def _write_rms(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        **_sizes(decoder),
        "num_key_value_heads": decoder.num_query_groups,
        "head_dim": decoder.kv_channels,
        "rms_norm_eps": decoder.norm_epsilon,
    }


def _sizes(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.ffn_hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "max_position_embeddings": decoder.max_position_embeddings,
        "hidden_act": _hf_activation(decoder),
        "attention_dropout": decoder.attention_dropout,
        "rope_parameters": _rope(decoder),
    }


def _rope(decoder: DecoderConfig) -> dict[str, Any]:
    if decoder.rotary_scaling is None:
        return {"rope_type": "default", "rope_theta": decoder.rotary_base}
    return {"rope_type": "llama3", "rope_theta": decoder.rotary_base, "factor": decoder.rotary_scaling, **LLAMA3}


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        _read_gpt2,
        _write_gpt2,
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", _read_neox, _write_neox, {"attention_bias": True}),
    "llama": Family("LlamaForCausalLM", _read_llama, _write_llama, {}),
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_mistral, {}),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen2, {}),
    "qwen3": Family("Qwen3ForCausalLM", _read_qwen3, _write_qwen2, {"attention_bias": False}),
    "gemma": Family(
        "GemmaForCausalLM",
        _read_gemma,
        _write_rms,
        {"attention_bias": False, "use_bidirectional_attention": False},
    ),
}
"""By ``model_type``. `hf_config_of` takes the first that fits."""


def _rotary(config: PretrainedConfig) -> dict[str, Any]:
    rotary = config.rope_parameters
    percentage = rotary.get("partial_rotary_factor") or 1.0
    if percentage != 1 and config.model_type != "gpt_neox":
        must = "it must be 1 in this architecture"
        raise ValueError(_refusal(config, "rope_parameters.partial_rotary_factor", percentage, must))
    found = {
        "position": "rope",
        "rotary_base": float(rotary["rope_theta"]),
        "rotary_percentage": float(percentage),
    }
    kind = rotary.get("rope_type", "default")
    if kind == "default":
        return found
    if kind != "llama3":
        raise ValueError(_refusal(config, "rope_parameters.rope_type", kind, "it must be default or llama3"))
    for name, wanted in LLAMA3.items():
        if rotary[name] != wanted:
            raise ValueError(_refusal(config, f"rope_parameters.{name}", rotary[name], f"it must be {wanted}"))
    return found | {"rotary_scaling": float(rotary["factor"])}


def _window(config: PretrainedConfig) -> int | None:
    # sequences longer than the window are refused, so layers without a window compute the same
    return config.sliding_window if "sliding_attention" in config.layer_types else None


def _activation(config: PretrainedConfig, name: str = "hidden_act") -> str:
    got = getattr(config, name)
    if got not in ACTIVATIONS:
        raise ValueError(_refusal(config, name, got, f"it must be one of {', '.join(ACTIVATIONS)}"))
    return ACTIVATIONS[got]


def _hf_activation(decoder: DecoderConfig) -> str:
    # the last of two names wins: "gelu_pytorch_tanh", torch's own function
    return {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "swish"}.get(decoder.activation, "gelu")


def _written(decoder: DecoderConfig, name: str) -> tuple[PretrainedConfig | None, str]:
    """(the configuration that describes `decoder`, "") or (None, the reason)."""
    family = _family(name)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    common = {"tie_word_embeddings": decoder.tied, "initializer_range": decoder.init_std}
    arguments = {**special, **common, **family.write(decoder), "architectures": [family.architecture]}
    try:
        config = AutoConfig.for_model(name, **arguments)
        said = decoder_config_of(config)
    except (StrictDataclassError, ValueError) as error:
        return None, str(error)
    names = [each.name for each in dataclasses.fields(DecoderConfig) if each.name not in TRAINING_ONLY]
    different = [each for each in names if getattr(said, each) != getattr(decoder, each)]
    return (None, f"{', '.join(different)} would differ") if different else (config, "")


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(
            f"The Megatron backend does not support the architecture {name!r}: use one of {', '.join(FAMILIES)}, or an "
            "Accelerate trainer, which runs any model of transformers"
        )
    return FAMILIES[name]


def _refusal(config: PretrainedConfig, name: str, got: Any, must: str) -> str:
    return f"The Megatron backend does not support {config.model_type} models with {name} {got!r}: {must}"
