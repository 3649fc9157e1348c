"""Converts between ``model_config.yaml`` of a `.nemo` archive and `DecoderConfig`.

The keys are those of NeMo 1.x's GPT models. Models that Megatron-Core would compute differently are refused, and so are
models that the keys cannot describe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from trlx import logging
from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.families import TRAINING_ONLY
from trlx.backends.megatron.nemo.archive import CONFIG_FILE
from trlx.backends.megatron.nemo.decoder import SIZES, read_decoder
from trlx.backends.megatron.nemo.file import Lookup
from trlx.backends.megatron.nemo.keys import KEYS, REFUSED
from trlx.strict import ConfigError

logger = logging.get_logger(__name__)

WITH_WEIGHTS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "kv_channels",
    "normalization": "normalization",
    "norm_offset": "normalization",
    "gated": "activation",
    "bias": "bias",
    "qkv_bias": "bias",
    "qk_norm": "qk_layernorm",
    "position": "position_embedding_type",
    "tied": "share_embeddings_and_output_weights",
}
"""Fields of `DecoderConfig` that need other weights when they change -> the key of each."""

ADDED = {
    "mcore_gpt": "names of the weights",
    "qkv_bias": "a bias for queries, keys and values only",
    "qk_layernorm": "norms of queries and keys",
    "layernorm_zero_centered_gamma": "1 is added to the weight of every norm",
    "apply_embedding_scaling": "embeddings are multiplied by the root of the width",
    "scale_positional_embedding": "Llama-3's rotary scaling, factor 8",
    "window_size": "the attention window",
    "vocab_size": "number of tokens, without padding",
    "tokenizer": "the run's tokenizer is used",
    "nemo_version": "for the record",
    "target": "for the record",
    "use_flash_attention": "speed only",
    "override_vocab_size": "rows of the embedding",
}
"""More keys of archives, besides those in docs/megatron-config.md."""

COMPUTES: dict[str, tuple[Any, ...]] = {
    **{key: REFUSED[f"model.{key}"][0] for key in ("headscale", "normalize_attention_scores", "attention_type")},
    "transformer_block_type": REFUSED["model.transformer_block_type"][0],
    "rotary_interleaved": (False,),
    "seq_len_interpolation_factor": (1,),
    "multi_query_attention": (False,),
    "num_moe_experts": (0, 1),
    "hyena": ({},),
    "mcore_customization_config": ({},),
}
"""Keys that change what a model computes -> the supported values, besides null."""

STRETCHED = 8.0
"""The factor of ``scale_positional_embedding``."""


def read_config(config: Mapping[str, Any], where: str, changes: Mapping[str, Any] | None = None) -> DecoderConfig:
    """The decoder in an archive's config; ``vocab_size`` is None if the config has none.

    Args:
        where: the archive's name in error messages.
        changes: values of the run's ``model`` section, which replace the archive's unless they are null.

    Raises:
        ConfigError: the config is not that of a supported GPT model, or a change needs other weights; the message names
            the keys.
    """
    own = _read(config, where)
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    if not given:
        return own
    wanted = dataclasses.replace(_read({**config, **given}, where), vocab_size=own.vocab_size)
    differing = [field for field in WITH_WEIGHTS if getattr(own, field) != getattr(wanted, field)]
    if wanted.position == "learned" and wanted.max_position_embeddings != own.max_position_embeddings:
        differing.append("max_position_embeddings")
    if differing:
        keys = dict.fromkeys(WITH_WEIGHTS.get(field, field) for field in differing)
        said = ", ".join(f"{key} {given.get(key)!r} (it has {config.get(key)!r})" for key in keys)
        raise ConfigError(f"megatron_cfg.model does not fit the weights in {where}: {said}; leave these keys out")
    return wanted


def write_config(
    decoder: DecoderConfig, *, tensor: int, pipeline: int, rows: int, divisor: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The content of ``model_config.yaml`` for a decoder.

    Args:
        rows: rows of the embedding, a multiple of `divisor` x `tensor`.

    Raises:
        ValueError: NeMo has no key for a field of the decoder; the message names it.
    """
    config = {
        # a class in every NeMo since 1.0; restore_from replaces it by the class it is called on
        "target": "nemo.core.classes.modelPT.ModelPT",
        "mcore_gpt": True,
        "precision": _PRECISIONS.get(dtype, 32),
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "encoder_seq_length": decoder.max_position_embeddings,
        **_sizes(decoder),
        **_variants(decoder),
        "make_vocab_size_divisible_by": divisor,
        "padded_vocab_size": rows,
        "vocab_size": decoder.vocab_size,
        "init_method_std": decoder.init_std,
        "hidden_dropout": decoder.hidden_dropout,
        "attention_dropout": decoder.attention_dropout,
    }
    said = _read(config, "this model")
    names = [field.name for field in dataclasses.fields(DecoderConfig) if field.name not in TRAINING_ONLY]
    different = [name for name in names if getattr(said, name) != getattr(decoder, name)]
    if different:
        raise ValueError(f"A .nemo archive cannot describe this model: NeMo has no keys for its {', '.join(different)}")
    return config


def warn_of_unknown(config: Mapping[str, Any], where: str) -> None:
    """Warns of keys that are not read."""
    known = {key.split(".")[1] for key in KEYS if key.startswith("model.")} | ADDED.keys() | COMPUTES.keys()
    unknown = [key for key, value in config.items() if key not in known and value not in (None, False, {}, [])]
    if unknown:
        logger.warning(f"{where}: these keys of {CONFIG_FILE} are not read: {', '.join(map(str, unknown))}")


_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: 16}


def _read(config: Mapping[str, Any], where: str) -> DecoderConfig:
    section = Lookup(config, CONFIG_FILE)
    try:
        if not all(section.has(key) for key in SIZES):
            raise ConfigError(f"{CONFIG_FILE} does not describe a GPT model: it must have {', '.join(SIZES)}")
        _check_computed(section)
        decoder = read_decoder(section)
        assert decoder is not None  # the sizes are there
        return dataclasses.replace(decoder, **_additions(section, decoder))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_computed(section: Lookup) -> None:
    for key, accepted in COMPUTES.items():
        if section.has(key) and section.get(key) not in accepted:
            said = " or ".join(str(value) for value in accepted)
            raise ConfigError(
                f"{CONFIG_FILE} has {key} {section.get(key)!r}, which the Megatron backend does not support: it must "
                f"be {said} or null"
            )
    if section.flag("megatron_legacy", False) and section.has("num_query_groups"):
        groups, heads = section.get("num_query_groups"), section.get("num_attention_heads")
        section.require(groups == heads, "num_query_groups", f"be {heads}, one for each head, with megatron_legacy")


def _additions(section: Lookup, decoder: DecoderConfig) -> dict[str, Any]:
    """Fields whose keys only archives have."""
    found: dict[str, Any] = {
        "vocab_size": section.integer("vocab_size"),
        "qkv_bias": decoder.bias or section.flag("qkv_bias", False),
        "qk_norm": section.flag("qk_layernorm", False),
        "attention_window": _window(section),
    }
    if section.flag("layernorm_zero_centered_gamma", False):
        found["norm_offset"] = 1.0
    if section.flag("apply_embedding_scaling", False):
        found["embedding_scale"] = decoder.hidden_size**0.5
    if section.flag("scale_positional_embedding", False):
        found["rotary_scaling"] = STRETCHED
    if decoder.activation == "gelu" and _is_tanh(section, decoder):
        found["activation"] = "gelu_tanh"
    return found


def _is_tanh(section: Lookup, decoder: DecoderConfig) -> bool:
    """Whether a gated gelu is the tanh form. `read_decoder` decides it for a gelu without gate."""
    is_fused = decoder.bias and section.flag("bias_activation_fusion", True)
    return section.flag("openai_gelu", False) or (decoder.gated and is_fused)


def _window(section: Lookup) -> int | None:
    window = section.get("window_size")
    if window is None:
        return None
    is_pair = isinstance(window, (list, tuple)) and len(window) == 2 and all(type(each) is int for each in window)
    section.require(is_pair and window[0] > 0 and window[1] == 0, "window_size", "be [window, 0]")
    return window[0]


def _sizes(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": decoder.max_position_embeddings,
        "num_layers": decoder.num_layers,
        "hidden_size": decoder.hidden_size,
        "ffn_hidden_size": decoder.ffn_hidden_size,
        "num_attention_heads": decoder.num_attention_heads,
        "num_query_groups": decoder.num_query_groups,
        "kv_channels": decoder.kv_channels,
    }


def _variants(decoder: DecoderConfig) -> dict[str, Any]:
    is_offset, is_rms = decoder.norm_offset == 1, decoder.normalization == "rmsnorm"
    return {
        "normalization": "layernorm1p" if is_offset and not is_rms else decoder.normalization,
        "layernorm_zero_centered_gamma": is_offset and is_rms,
        "layernorm_epsilon": decoder.norm_epsilon,
        "activation": _activation(decoder),
        "openai_gelu": decoder.activation == "gelu_tanh",
        "bias_activation_fusion": False,
        "bias": decoder.bias,
        "qkv_bias": decoder.qkv_bias,
        "qk_layernorm": decoder.qk_norm,
        "position_embedding_type": "rope" if decoder.position == "rope" else "learned_absolute",
        "rotary_percentage": decoder.rotary_percentage,
        "rotary_base": decoder.rotary_base,
        "scale_positional_embedding": decoder.rotary_scaling is not None,
        "apply_embedding_scaling": decoder.embedding_scale != 1,
        "window_size": None if decoder.attention_window is None else [decoder.attention_window, 0],
        "share_embeddings_and_output_weights": decoder.tied,
    }


def _activation(decoder: DecoderConfig) -> str:
    kind = decoder.activation.removesuffix("_tanh")
    if not decoder.gated:
        return "gelu" if kind == "silu" else kind
    return {"gelu": "fast-geglu", "relu": "fast-reglu", "silu": "fast-swiglu"}[kind]
