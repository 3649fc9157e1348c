"""Reads the decoder in the ``model`` section of a NeMo config file."""

from __future__ import annotations

from typing import Any

from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.nemo.file import Lookup
from trlx.strict import ConfigError

SIZES = ("num_layers", "hidden_size", "num_attention_heads")
"""The required keys of a section that describes a model."""
ACTIVATIONS: dict[str, tuple[str, bool]] = {
    "gelu": ("gelu", False),
    "relu": ("relu", False),
    "geglu": ("gelu", True),
    "reglu": ("relu", True),
    "swiglu": ("silu", True),
}
"""NeMo's name -> (our activation, whether it is gated). NeMo's fast- forms compute the same."""
NORMS: dict[str, tuple[str, float]] = {
    "layernorm": ("layernorm", 0.0),
    "layernorm1p": ("layernorm", 1.0),
    "rmsnorm": ("rmsnorm", 0.0),
}
"""NeMo's name -> (our norm, the offset of its weight)."""
POSITIONS = {"learned_absolute": "learned", "rope": "rope"}


def read_decoder(section: Lookup) -> DecoderConfig | None:
    """The decoder, with NeMo's defaults and ``vocab_size`` None; None if the section has none of `SIZES`.

    Raises:
        ConfigError: some of `SIZES` are missing, or a value has the wrong type, is out of range or unknown.
    """
    given = [key for key in SIZES if section.has(key)]
    if not given:
        return None
    if len(given) < len(SIZES):
        missing = ", ".join(f"{section.where}.{key}" for key in SIZES if key not in given)
        raise ConfigError(
            f"Missing: {missing}. Write all of {', '.join(SIZES)}, or none to take the pretrained model's"
        )
    normalization, offset = NORMS[section.choice("normalization", "layernorm", NORMS)]
    position = section.choice("position_embedding_type", "learned_absolute", POSITIONS)
    return DecoderConfig(
        **_sizes(section),
        **_feed_forward(section),
        vocab_size=None,
        normalization=normalization,
        norm_epsilon=section.number("layernorm_epsilon", 1e-5, least=0),
        norm_offset=offset,
        qkv_bias=section.flag("bias", True),
        position=POSITIONS[position],
        rotary_base=section.number("rotary_base", 10_000.0, least=1),
        rotary_percentage=_rotary_percentage(section),
        tied=section.flag("share_embeddings_and_output_weights", True),
        init_std=section.number("init_method_std", 0.02, least=0),
        hidden_dropout=section.number("hidden_dropout", 0.1, least=0, below=1),
        attention_dropout=section.number("attention_dropout", 0.1, least=0, below=1),
    )


def _sizes(section: Lookup) -> dict[str, int]:
    layers, hidden, heads = (section.integer(key) for key in SIZES)
    if not section.has("kv_channels") and hidden % heads:
        raise ConfigError(
            f"{section.where}.hidden_size {hidden} is not a multiple of num_attention_heads {heads}: write "
            "kv_channels, the width of one head"
        )
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": section.integer("num_query_groups", heads),
        "kv_channels": section.integer("kv_channels", hidden // heads),
        "ffn_hidden_size": section.integer("ffn_hidden_size", 4 * hidden),
        "max_position_embeddings": section.integer("max_position_embeddings", 512),
    }


def _feed_forward(section: Lookup) -> dict[str, Any]:
    names = [*ACTIVATIONS, *(f"fast-{name}" for name, (_, gated) in ACTIVATIONS.items() if gated)]
    name = section.choice("activation", "gelu", names)
    activation, gated = ACTIVATIONS[name.removeprefix("fast-")]
    bias = section.flag("bias", True)
    is_fused = bias and section.flag("bias_activation_fusion", True)
    if name == "gelu" and (is_fused or section.flag("openai_gelu", False)):
        activation = "gelu_tanh"  # NeMo's fused gelu is the tanh form
    return {"activation": activation, "gated": gated, "bias": bias}


def _rotary_percentage(section: Lookup) -> float:
    part = section.number("rotary_percentage", 1.0, least=0)
    section.require(0 < part <= 1, "rotary_percentage", "be more than 0 and at most 1")
    return part
