"""The policy on Megatron-Core: a GPT model whose last stage returns per-token outputs instead of logits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from trlx.backends.base import ModelNeeds
from trlx.backends.megatron.blocks import FreezableBlock, block_spec
from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.heads import make_heads
from trlx.backends.megatron.parallel import tensor_group
from trlx.backends.megatron.settings import MegatronSettings
from trlx.backends.megatron.vocabulary import VocabularyShard
from trlx.batch import TokenOutputs
from trlx.models.logprobs import in_chunks, spread

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class PolicyStage(GPTModel):
    """One pipeline stage, or one chunk of an interleaved stage. The last one has the heads.

    Called with tokens [B, T], the places of the response tokens and the lengths of rows, the last stage returns
    `TokenOutputs`, the others hidden states. With a score head there is no output layer.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        config: TransformerConfig,
        padded_vocab: int,
        needs: ModelNeeds,
        seed: int,
        chunk: int | None,
    ):
        is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=chunk is None, vp_stage=chunk)
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=chunk is None, vp_stage=chunk)
        chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
        super().__init__(
            config,
            block_spec(decoder, config, config.num_layers // chunks),
            vocab_size=padded_vocab,
            max_sequence_length=decoder.max_position_embeddings,
            pre_process=is_first,
            post_process=is_last,
            share_embeddings_and_output_weights=decoder.tied and not needs.score_head,
            position_embedding_type={"learned": "learned_absolute", "rope": "rope"}[decoder.position],
            rotary_percent=decoder.rotary_percentage,
            rotary_base=decoder.rotary_base,
            rope_scaling=decoder.rotary_scaling is not None,
            rope_scaling_factor=decoder.rotary_scaling or 1.0,
            vp_stage=chunk,
        )
        if is_last and needs.score_head:
            self.output_layer.weight = None
        self.decoder.__class__ = FreezableBlock  # GPTModel takes no class for its decoder
        self.trains_below = True
        """Whether layers before this stage or chunk train."""
        self.wants_gradients = True
        """Whether layers in or before this stage or chunk train."""
        self.to(config.params_dtype)  # torch makes norms and position embeddings in float32
        self.decoder_config = decoder
        self.temperature = needs.temperature
        self.first_layer = get_transformer_layer_offset(config, vp_stage=chunk)
        width = padded_vocab // config.tensor_model_parallel_size
        shard = VocabularyShard(parallel_state.get_tensor_model_parallel_rank() * width, width, decoder.vocab_size)
        self.shard = shard
        self._clear_padding()
        self.heads = make_heads(decoder, shard, needs, seed) if is_last else None
        if is_first and needs.dropout and decoder.embedding_dropout is not None:
            self.embedding.embedding_dropout.p = decoder.embedding_dropout
        if is_first and decoder.embedding_scale != 1.0:
            scale = torch.tensor(decoder.embedding_scale, dtype=config.params_dtype)
            self.embedding.register_forward_hook(lambda _, args, embedded: embedded * scale.to(embedded.device))

    def forward(
        self,
        tokens: Tensor,
        at: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        kept: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | TokenOutputs:
        """Hidden states of a stage; on the last stage the outputs for the tokens `at`, see `TokenBatch.at`.

        With a score head these are the scores at the last tokens of rows, whose `lengths` [B] do not count padding.

        With an ``inference_context`` the last stage returns logits [B, V] and hidden states [B, d] of the last column.

        Args:
            kept: what the frozen layers at the bottom of this stage return; they do not run then.
        """
        positions = kwargs.pop("positions", None)
        if positions is None:
            positions = _positions(tokens)
        mask = kwargs.pop("attention_mask", None)
        if kept is not None and self.pre_process:
            kwargs["decoder_input"] = kept
        elif kept is not None:
            super().set_input_tensor(kept)
        with nullcontext() if kept is None else self.decoder.above_frozen():
            return super().forward(tokens, positions, mask, loss_mask=(at, lengths), **kwargs)

    def below(self, tokens: Tensor) -> Tensor:
        """The hidden states that `forward` takes as `kept`; where the next stage keeps them, those that it gets."""
        hidden, rotary, *_ = self._preprocess(tokens, _positions(tokens))
        hidden = hidden if self.pre_process else self.decoder.input_tensor
        count = self.decoder.lowest if self.post_process or self.wants_gradients else len(self.decoder.layers)
        return self.decoder.run_lowest(count, hidden, attention_mask=None, rotary_pos_emb=rotary)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Takes the hidden states of the previous stage, detached if no layer before this stage trains."""
        hidden = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if hidden is not None and not self.trains_below:
            if self.config.virtual_pipeline_model_parallel_size and torch.is_grad_enabled():
                hidden.grad = torch.zeros_like(hidden)  # the interleaved schedule always sends a gradient
            hidden = hidden.detach()
        super().set_input_tensor(hidden)

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        *_: Any,
        loss_mask: tuple[tuple[Tensor, Tensor], Tensor] | None = None,
        inference_context: Any = None,
        **__: Any,
    ) -> Tensor | TokenOutputs | tuple[Tensor, Tensor]:
        """What a stage returns. Overrides GPTModel's logits and loss."""
        if not self.post_process:
            return hidden_states
        if inference_context is not None:
            last = hidden_states[-1]
            return self.shard.gathered(self._logits(last).float()), last
        if self.config.sequence_parallel:
            # forward gathers all tokens on every rank; backward keeps each rank's own
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, False, tensor_group())
        return self._outputs(hidden_states.transpose(0, 1), input_ids, *loss_mask)

    @torch.no_grad()
    def _clear_padding(self) -> None:
        # zero the padding rows of random weights too, so that outputs do not depend on their number
        real = max(0, self.shard.size - self.shard.first)
        tables = [self.embedding.word_embeddings.weight] if self.pre_process else []
        tables += [self.output_layer.weight] if self.post_process and self.output_layer.weight is not None else []
        for table in tables:
            table[real:].zero_()

    def _outputs(self, hidden: Tensor, tokens: Tensor, at: tuple[Tensor, Tensor], lengths: Tensor) -> TokenOutputs:
        if self.heads is not None and "score" in self.heads:
            at_last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
            return TokenOutputs(torch.zeros(tokens.shape, device=hidden.device), last=self.heads["score"](at_last))
        at = at[0] * tokens.shape[1] + at[1]
        chosen = tokens.flatten().index_select(0, at)
        before = hidden.flatten(0, 1).index_select(0, at - 1)
        shared = tensor_parallel.copy_to_tensor_model_parallel_region(before, tensor_group())
        logprobs = in_chunks(self._logprobs, shared, chosen, self._logits)
        outputs = TokenOutputs(spread(logprobs, at, tokens.shape))
        if self.heads is not None and "value" in self.heads:
            outputs.values = spread(self.heads["value"](before), at, tokens.shape)
        if self.heads is not None and "q" in self.heads:
            q = [spread(each, at, tokens.shape) for each in self.heads["q"](before, chosen)]
            outputs.q, outputs.target_q, outputs.q_logprobs = q
        return outputs

    def _logprobs(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        logits = self._logits(hidden).float()
        if self.temperature != 1.0:  # dividing by 1 would copy the logits
            logits = logits / self.temperature
        return self.shard.logprobs(logits, chosen)

    def _logits(self, hidden: Tensor) -> Tensor:
        """The columns of this tensor rank."""
        tied = self.share_embeddings_and_output_weights
        return F.linear(hidden, self.shared_embedding_or_output_weight() if tied else self.output_layer.weight)


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def transformer_config(decoder: DecoderConfig, settings: MegatronSettings, needs: ModelNeeds) -> TransformerConfig:
    """Megatron-Core's configuration."""
    sizes, recompute = settings.sizes, settings.recompute
    dropout = {"hidden_dropout": decoder.hidden_dropout, "attention_dropout": decoder.attention_dropout}
    return TransformerConfig(
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        ffn_hidden_size=decoder.ffn_hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        num_query_groups=decoder.num_query_groups,
        kv_channels=decoder.kv_channels,
        normalization={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[decoder.normalization],
        layernorm_epsilon=decoder.norm_epsilon,
        activation_func=ACTIVATIONS[decoder.activation],
        gated_linear_unit=decoder.gated,
        add_bias_linear=decoder.bias,
        add_qkv_bias=decoder.qkv_bias,
        qk_layernorm=decoder.qk_norm,
        softmax_scale=decoder.softmax_scale,
        init_method_std=decoder.init_std,
        **(dropout if needs.dropout else dict.fromkeys(dropout, 0.0)),
        params_dtype=settings.dtype,
        pipeline_dtype=settings.dtype,
        bf16=settings.dtype == torch.bfloat16,
        fp16=settings.dtype == torch.float16,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual,
        sequence_parallel=sizes.sequence,
        recompute_granularity=recompute.granularity,
        recompute_method=recompute.method,
        recompute_num_layers=recompute.num_layers,
        use_cpu_initialization=not torch.cuda.is_available(),
        # microbatches differ in width; TransformerConfig then requires moe_token_dispatcher_type
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # with two interleaved stages both neighbours are one process, and batched sends mix up their messages
        overlap_p2p_comm=sizes.virtual is not None,
        batch_p2p_comm=sizes.virtual is None,
        batch_p2p_sync=False,
        cuda_graph_scope=[],  # Megatron-Core warns of its own default
        finalize_model_grads_func=finalize_model_grads,
    )


def build_chunks(
    decoder: DecoderConfig,
    settings: MegatronSettings,
    padded_vocab: int,
    needs: ModelNeeds,
    seed: int,
    device: torch.device,
) -> list[PolicyStage]:
    """This process's pipeline stage: one model, or one model per interleaved chunk."""
    config = transformer_config(decoder, settings, needs)
    numbers = [None] if settings.sizes.virtual is None else range(settings.sizes.virtual)
    return [PolicyStage(decoder, config, padded_vocab, needs, seed, chunk).to(device) for chunk in numbers]


def freeze(chunks: list[PolicyStage], num_layers_unfrozen: int) -> None:
    """Freezes all but the top `num_layers_unfrozen` blocks, the final norm, an untied output layer and the heads.

    See ``trlx.models.decoder.freeze``.

    Raises:
        ValueError: `num_layers_unfrozen` is below -1 or above the number of blocks.
    """
    num_layers = chunks[0].decoder_config.num_layers
    if not -1 <= num_layers_unfrozen <= num_layers:
        raise ValueError(
            f"num_layers_unfrozen is {num_layers_unfrozen}, but the model has {num_layers} blocks: write -1 to train "
            f"everything, 0 to train the heads only, or 1 to {num_layers}."
        )
    if num_layers_unfrozen == -1:
        return
    first = num_layers - num_layers_unfrozen
    for chunk in chunks:
        language_model(chunk).requires_grad_(False)
        if num_layers_unfrozen:
            for module in _top(chunk, first):
                module.requires_grad_(True)
        below, here = chunk.first_layer, len(chunk.decoder.layers)
        chunk.trains_below, chunk.wants_gradients = first < below, first < below + here
        chunk.decoder.skip_recompute(min(max(first - below, 0), here))


def language_model(chunk: PolicyStage) -> nn.ModuleDict:
    """The modules of a stage without the heads."""
    return nn.ModuleDict({name: child for name, child in chunk.named_children() if name != "heads"})


def _top(chunk: PolicyStage, first: int) -> list[nn.Module]:
    blocks = [layer for i, layer in enumerate(chunk.decoder.layers) if chunk.first_layer + i >= first]
    norm = [chunk.decoder.final_layernorm] if chunk.post_process else []
    untied = chunk.post_process and not chunk.share_embeddings_and_output_weights
    return [*blocks, *norm, *([chunk.output_layer] if untied else [])]
