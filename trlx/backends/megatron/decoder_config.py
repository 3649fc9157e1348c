"""What the engine must know of a decoder to build it: one flat description for every family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes and variants of a decoder. Example: GPT-2 small is ``Shape(num_layers=12, hidden_size=768, ...)``."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads; as many as attention heads where none are shared."""
    kv_channels: int
    """Width of one attention head."""
    max_position_embeddings: int
    vocab_size: int | None
    """Tokens the model knows, padding rows not counted; None until the tokenizer is known."""

    normalization: str = "layernorm"
    """"layernorm" or "rmsnorm"."""
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0
    """Added to the weight of every norm (Gemma: 1)."""
    activation: str = "gelu"
    """"gelu", "gelu_tanh", "silu" or "relu"."""
    gated: bool = False
    """The feed-forward block multiplies the activation with a second projection (SwiGLU, GeGLU)."""
    bias: bool = True
    """Every projection but those of queries, keys and values adds a bias."""
    qkv_bias: bool = True
    qk_norm: bool = False
    """Queries and keys are normalised head by head (Qwen3)."""
    parallel_residual: bool = False
    """Attention and feed-forward both read the block's input, and their sum is added to it (GPT-NeoX)."""
    position: str = "learned"
    """"learned" or "rope"."""
    rotary_base: float = 10_000.0
    rotary_percentage: float = 1.0
    """The part of each head that is rotated."""
    rotary_scaling: float | None = None
    """Factor of Llama-3's stretched rotary embedding; None: not stretched."""
    embedding_scale: float = 1.0
    """What comes out of the token embedding is multiplied by this (Gemma: the root of the width)."""
    softmax_scale: float | None = None
    """Attention scores are multiplied by this; None: one over the root of `kv_channels`."""
    attention_window: int | None = None
    """Longest distance that attention looks back; longer sequences are refused."""
    tied: bool = False
    """Token embedding and output head are one weight."""
    init_std: float = 0.02
    hidden_dropout: float = 0.0
    embedding_dropout: float | None = None
    """Of what comes out of the embedding; None: as `hidden_dropout`."""
    attention_dropout: float = 0.0
