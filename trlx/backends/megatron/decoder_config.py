"""Sizes and variants of a decoder, with the same fields for every model family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What a decoder is built from. Example: GPT-2 small is ``DecoderConfig(num_layers=12, hidden_size=768, ...)``."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads; equal to `num_attention_heads` without grouped-query attention."""
    kv_channels: int
    """Width of one attention head."""
    max_position_embeddings: int
    vocab_size: int | None
    """Number of tokens, without padding rows; None until the tokenizer is known."""

    normalization: str = "layernorm"
    """"layernorm" or "rmsnorm"."""
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0
    """Added to the weight of every norm; 1 in Gemma."""
    activation: str = "gelu"
    """"gelu", "gelu_tanh", "silu" or "relu"."""
    gated: bool = False
    """Gated feed-forward blocks (SwiGLU, GeGLU): the activation is multiplied by a second projection."""
    bias: bool = True
    """Biases in all projections except those of queries, keys and values."""
    qkv_bias: bool = True
    qk_norm: bool = False
    """Normalise queries and keys in each head (Qwen3)."""
    parallel_residual: bool = False
    """x + attention(norm(x)) + feedforward(norm(x)), as in GPT-NeoX."""
    position: str = "learned"
    """"learned" or "rope"."""
    rotary_base: float = 10_000.0
    rotary_percentage: float = 1.0
    """Fraction of each head that is rotated."""
    rotary_scaling: float | None = None
    """Factor of Llama-3's rotary scaling; None: no scaling."""
    embedding_scale: float = 1.0
    """Factor on token embeddings; sqrt(hidden_size) in Gemma."""
    softmax_scale: float | None = None
    """Factor on attention scores; None: 1 / sqrt(kv_channels)."""
    attention_window: int | None = None
    """Size of the attention window. Longer sequences are refused."""
    tied: bool = False
    """Token embedding and output head share one weight."""
    init_std: float = 0.02
    hidden_dropout: float = 0.0
    embedding_dropout: float | None = None
    """Dropout after the embedding; None: `hidden_dropout`."""
    attention_dropout: float = 0.0
