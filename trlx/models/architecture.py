"""How token ids go through a model, in training and in sampling: one class for each ``model.model_arch_type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trlx import logging
from trlx.data.collate import EncoderDecoderRows, RowFormat, left_pad, right_pad
from trlx.models.decoder import trunk
from trlx.registry import architectures, register_architecture

logger = logging.get_logger(__name__)


class Architecture(Protocol):
    """One way of running a model."""

    model: PreTrainedModel

    def states(self, tokens: Tensor, encoder_tokens: Tensor | None, encoder_mask: Tensor | None) -> Tensor:
        """Hidden states [B, T, d] after each of `tokens` [B, T], rows right-padded.

        No mask of `tokens` is needed: no state depends on tokens to its right, and padding is only there, so the answer
        is the same and attention keeps its fast causal kernel. The encoder's columns [B, S] are for models with one.
        """

    def whole_logits(self, tokens: Tensor) -> Tensor:
        """Logits [1, T, V] of `tokens` [1, T] as the model itself computes them, to check all else against."""

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        """(arguments of ``generate``, number of columns that stand before the response in what it returns)."""

    def row_format(self, tokenizer: PreTrainedTokenizerBase) -> RowFormat:
        """How rollouts become rows of this model."""

    def recompute(self) -> None:
        """From now on activations are computed again in the backward pass, to save memory."""

    def bare(self) -> Architecture:
        """The same without the virtual tokens of an adapter."""


@register_architecture("causal")
class Causal:
    """A decoder alone: prompt and response stand in one row.

    Args:
        adapter: the PEFT model around `model`, if there is one.
    """

    loader = AutoModelForCausalLM

    def __init__(self, model: PreTrainedModel, adapter: nn.Module | None = None):
        self.model = model
        self.adapter = adapter
        # `states` passes no mask, as no token sees the padding to its right; transformers would warn of that
        model.base_model.warn_if_padding_and_no_attention_mask = _no_warning

    def states(
        self, tokens: Tensor, encoder_tokens: Tensor | None = None, encoder_mask: Tensor | None = None
    ) -> Tensor:
        return trunk(self.model)(tokens, use_cache=False)[0]

    def whole_logits(self, tokens: Tensor) -> Tensor:
        # the mask only keeps transformers from warning where one of these ids happens to be pad
        whole = self.adapter or self.model
        logits = whole(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        return logits[:, -tokens.shape[1] :]

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        tokens, mask = left_pad(prompts, pad_id)
        return {"input_ids": tokens, "attention_mask": mask}, tokens.shape[1]

    def row_format(self, tokenizer: PreTrainedTokenizerBase) -> RowFormat:
        return RowFormat()

    def recompute(self) -> None:
        recompute_activations(self.model)

    def bare(self) -> Causal:
        return Causal(self.model)


@register_architecture("seq2seq")
class EncoderDecoder:
    """An encoder that reads the prompt and a decoder that writes the response, which follows a start token.

    The encoder's rows are right-padded in training and in sampling, so that its positions are the same in both.

    Args:
        adapter: the PEFT model around `model`, if there is one.

    Raises:
        ValueError: the model does not say with which token its decoder starts.
    """

    loader = AutoModelForSeq2SeqLM

    def __init__(self, model: PreTrainedModel, adapter: nn.Module | None = None):
        self.model = model
        self.adapter = adapter
        self.start_id = getattr(model.config, "decoder_start_token_id", None)
        if self.start_id is None:
            raise ValueError(
                f"The config of this {type(model).__name__} has no decoder_start_token_id: set it (T5 starts with its "
                "pad token, BART with its eos token), in config.json or on the PretrainedConfig"
            )
        model.generation_config.decoder_start_token_id = self.start_id

    def states(self, tokens: Tensor, encoder_tokens: Tensor, encoder_mask: Tensor) -> Tensor:
        inputs = self.encoder_inputs(encoder_tokens, encoder_mask.long())
        read = self.model.get_encoder()(**inputs)[0]
        seen = {"encoder_hidden_states": read, "encoder_attention_mask": inputs["attention_mask"]}
        return trunk(self.model)(**self.decoder_inputs(tokens), **seen, use_cache=False)[0]

    def encoder_inputs(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What the encoder is fed, for prompts [B, S] and their int64 mask."""
        return {"input_ids": tokens, "attention_mask": mask}

    def decoder_inputs(self, tokens: Tensor) -> dict[str, Any]:
        """What the decoder is fed, for its rows [B, T]."""
        return {"input_ids": tokens}

    def whole_logits(self, tokens: Tensor) -> Tensor:
        whole, mask = self.adapter or self.model, torch.ones_like(tokens)
        return whole(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens, use_cache=False).logits

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        starts = torch.full((len(prompts), 1), self.start_id)
        return {**self.encoder_inputs(*right_pad(prompts, pad_id)), "decoder_input_ids": starts}, 1

    def row_format(self, tokenizer: PreTrainedTokenizerBase) -> RowFormat:
        return EncoderDecoderRows(self.start_id, tokenizer.sep_token or "<sep>")

    def recompute(self) -> None:
        recompute_activations(self.model)

    def bare(self) -> EncoderDecoder:
        return EncoderDecoder(self.model)


def recompute_activations(model: PreTrainedModel) -> None:
    """Keeps no activations inside blocks for the backward pass, but computes them again."""
    name = "activation_checkpointing_enable"  # which earlier versions of transformers 5 do not have
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def _no_warning(*_: Any) -> None:
    pass


def architecture_for(
    model_path: str | PretrainedConfig, arch_type: str, options: Mapping[str, Any]
) -> type[Causal] | type[EncoderDecoder]:
    """The class for a model: that of ``model.model_arch_type``, or of models with an encoder where it has one.

    Args:
        options: ``model.model_extra_configs``; where they say which files are read, the config is read from there.

    Raises:
        ValueError: what is asked for does not fit the model, or is not registered.
    """
    try:
        where = {name: value for name, value in options.items() if name in FROM_HUB}
        is_config = isinstance(model_path, PretrainedConfig)
        config = model_path if is_config else AutoConfig.from_pretrained(model_path, **where)
    except (OSError, ValueError):  # whoever loads the model says what is wrong with it
        return architectures.get(arch_type)
    asked = architectures.get(arch_type)
    if config.is_encoder_decoder and asked is Causal:
        logger.info(f"The model ({config.model_type}) has an encoder: model.model_arch_type is taken for seq2seq")
        return EncoderDecoder
    if config.is_encoder_decoder != issubclass(asked, EncoderDecoder):
        has = "have an encoder: write seq2seq" if config.is_encoder_decoder else "have no encoder: write causal"
        raise ValueError(f"model.model_arch_type is {arch_type!r}, but {config.model_type} models {has}")
    return asked


FROM_HUB = ("revision", "trust_remote_code", "code_revision", "token", "cache_dir", "local_files_only", "subfolder")
