"""Norms, attention and parallel residual for Megatron-Core's decoder blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from trlx.backends.megatron.decoder_config import DecoderConfig


def block_spec(decoder: DecoderConfig, config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The submodules of `num_layers` blocks."""
    spec = get_gpt_layer_local_spec(qk_layernorm=decoder.qk_norm, normalization=config.normalization)
    norm = OffsetNorm if decoder.norm_offset else Norm
    spec.module = ParallelResidualLayer if decoder.parallel_residual else TransformerLayer
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    parts.self_attention.submodules.core_attention = Attention
    if decoder.qk_norm:
        parts.self_attention.submodules.q_layernorm = parts.self_attention.submodules.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)


class FreezableBlock(TransformerBlock):
    """Megatron-Core's layers, with activation recomputation for trained layers only.

    Recomputed layers get no gradients unless their input requires one. Frozen layers at the bottom run without
    recomputation, and the input of the first recomputed layer is made to require a gradient.
    """

    lowest = 0
    """The number of frozen layers at the bottom that are not recomputed."""

    def skip_recompute(self, frozen: int) -> None:
        """Runs the lowest `frozen` layers without recomputation, except those recomputed together with higher ones."""
        config = self.config
        together = config.recompute_num_layers if config.recompute_method == "uniform" else 1
        self.lowest = frozen - frozen % together
        self.num_layers_per_pipeline_rank = len(self.layers) - self.lowest

    def run_lowest(self, count: int, hidden_states: Tensor, **inputs: Any) -> Tensor:
        """The hidden states after the lowest `count` layers."""
        for layer in self.layers[:count]:
            hidden_states, _ = layer(hidden_states=hidden_states, **inputs)
        return hidden_states

    @contextmanager
    def above_frozen(self) -> Iterator[None]:
        """Inside the block these `lowest` layers are left out."""
        layers, lowest = self.layers, self.lowest
        self.layers, self.lowest = layers[lowest:], 0
        try:
            yield
        finally:
            self.layers, self.lowest = layers, lowest

    def _get_layer(self, layer_number: int) -> nn.Module:
        return self.layers[self.lowest + layer_number]

    def _checkpointed_forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        inputs = {name: kwargs[name] for name in ("attention_mask", "rotary_pos_emb")}
        hidden_states = self.run_lowest(self.lowest, hidden_states, **inputs)
        if self.lowest < len(self.layers) and torch.is_grad_enabled() and not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_()
        return super()._checkpointed_forward(hidden_states, **kwargs)


class Norm:
    """torch's LayerNorm or RMSNorm, marked for sequence parallelism, which Megatron-Core's torch norm refuses."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> nn.Module:
        kind = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[config.normalization]
        return _marked(kind(hidden_size, eps=eps, dtype=config.params_dtype), config)


class OffsetNorm(nn.Module):
    """A norm that multiplies by 1 + weight: Gemma's RMSNorm, NeMo's layernorm1p."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        _marked(self, config)

    def forward(self, hidden: Tensor) -> Tensor:
        weight, states = 1 + self.weight.float(), hidden.float()
        if hasattr(self, "bias"):
            return F.layer_norm(states, weight.shape, weight, self.bias.float(), self.eps).type_as(hidden)
        return F.rms_norm(states, weight.shape, weight, self.eps).type_as(hidden)


class Attention(MegatronModule):
    """Attention by torch's fused kernel: queries [T, B, heads, d], keys and values [S, B, groups, d].

    `attention_mask` is bool [B, 1, T, S], True where a key is hidden; None: causal attention.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any):
        super().__init__(config)
        self.scale = softmax_scale if softmax_scale is not None else config.softmax_scale
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        heads = [each.permute(1, 2, 0, 3) for each in (query, key, value)]
        settings = {
            "attn_mask": None if attention_mask is None else ~attention_mask,
            "is_causal": attention_mask is None,
            "scale": self.scale,
            "enable_gqa": query.shape[2] != key.shape[2],
        }
        dropout = self.dropout if self.training else 0.0
        # tensor ranks hold different heads, so seed their dropout apart; sequence parallelism already does it per block
        forks = dropout and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forks else nullcontext():
            context = F.scaled_dot_product_attention(*heads, dropout_p=dropout, **settings)
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm(x)) + feedforward(norm(x)), as in GPT-NeoX."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        kwargs.pop("dynamic_inference_decode_only", None)
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        return attended + self._forward_mlp(hidden_states) - hidden_states, context


def _marked(norm: nn.Module, config: TransformerConfig) -> nn.Module:
    # with sequence parallelism each tensor rank sees some of the tokens: Megatron-Core sums gradients of marked weights
    for weight in norm.parameters():
        weight.sequence_parallel = config.sequence_parallel
    return norm
