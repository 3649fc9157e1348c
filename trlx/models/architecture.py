"""How token ids go through a model, in training and in sampling: one class for each ``model.model_arch_type``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trlx import logging
from trlx.data.collate import EncoderDecoderRows, RowFormat, left_pad, right_pad
from trlx.data.hub import WHICH_FILES
from trlx.models.decoder import trunk
from trlx.registry import architectures, register_architecture

logger = logging.get_logger(__name__)


COSTLY = [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")] + [
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    for kernel in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
]
"""Operations that selective recomputation does not repeat."""


class Architecture(ABC):
    """One way of running a model.

    Args:
        adapter: the PEFT model around `model`, if there is one.
    """

    loader: type
    """The ``AutoModel`` class of transformers that loads the model."""

    def __init__(self, model: PreTrainedModel, adapter: nn.Module | None = None):
        self.model, self.adapter = model, adapter

    @abstractmethod
    def states(self, tokens: Tensor, encoder_tokens: Tensor | None, encoder_mask: Tensor | None) -> Tensor:
        """Hidden states [B, T, d] after each of `tokens` [B, T], rows right-padded.

        There is no mask for `tokens`: a state does not depend on the tokens to its right, where all padding is. Without
        a mask attention uses its fast causal kernel. The encoder's columns [B, S] are for models with an encoder.
        """

    @abstractmethod
    def whole_logits(self, tokens: Tensor) -> Tensor:
        """The model's own logits [1, T, V] of `tokens` [1, T], to check the logits from `states` against."""

    @abstractmethod
    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        """(arguments of ``generate``, number of columns before the response in what it returns)."""

    @abstractmethod
    def row_format(self, tokenizer: PreTrainedTokenizerBase) -> RowFormat:
        """How rollouts become rows of this model."""

    def recompute(self, selective: bool = False) -> None:
        """Turns activation checkpointing on: the backward pass computes activations again, to save memory.

        With `selective` it keeps what matrix products and attention return, and computes what costs little again.
        """
        name = "activation_checkpointing_enable"  # earlier versions of transformers 5 do not have it
        kept = {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, COSTLY)}
        enable = getattr(self.model, name if hasattr(self.model, name) else "gradient_checkpointing_enable")
        enable(kept if selective else None)

    def bare(self) -> Architecture:
        """The same architecture without the adapter's virtual tokens."""
        return (EncoderDecoder if isinstance(self, EncoderDecoder) else Causal)(self.model)


@register_architecture("causal")
class Causal(Architecture):
    """A decoder without an encoder: prompt and response stand in one row."""

    loader = AutoModelForCausalLM

    def __init__(self, model: PreTrainedModel, adapter: nn.Module | None = None):
        super().__init__(model, adapter)
        # transformers would warn that `states` passes no mask
        model.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None

    def states(self, tokens: Tensor, *encoder: Tensor | None) -> Tensor:
        return trunk(self.model)(tokens, use_cache=False)[0]

    def whole_logits(self, tokens: Tensor) -> Tensor:
        # without the mask transformers would warn if one of these ids is the pad token's
        whole = self.adapter or self.model
        logits = whole(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        return logits[:, -tokens.shape[1] :]

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        tokens, mask = left_pad(prompts, pad_id)
        return {"input_ids": tokens, "attention_mask": mask}, tokens.shape[1]

    def row_format(self, tokenizer: PreTrainedTokenizerBase) -> RowFormat:
        return RowFormat()


class OneLabel:
    """``AutoModelForSequenceClassification`` for models with one label."""

    @staticmethod
    def from_pretrained(model_path: str, **options: Any) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, **options)

    @staticmethod
    def from_config(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config, **options)


class Scored(Causal):
    """A decoder with one score for each row, read at its last token: a classifier of transformers.

    Raises:
        ValueError: the classifier has another head than a linear layer ``score`` without bias.
    """

    loader = OneLabel

    def __init__(self, model: PreTrainedModel, adapter: nn.Module | None = None):
        super().__init__(model, adapter)
        if not hasattr(model, "score") or getattr(model.score, "bias", None) is not None:
            raise ValueError(
                f"{type(model).__name__} cannot be a reward model: its head is not a linear layer `score` without bias"
            )

    def whole_logits(self, tokens: Tensor) -> Tensor:
        """[1, T, 1]: what the classifier itself says about each beginning of `tokens`."""
        config, whole = self.model.config.get_text_config(), self.adapter or self.model
        pad, config.pad_token_id = config.pad_token_id, None  # it classifies at the last token that is not pad
        try:
            beginnings = [tokens[:, : end + 1] for end in range(tokens.shape[1])]
            said = [whole(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False) for ids in beginnings]
        finally:
            config.pad_token_id = pad
        return torch.stack([each.logits for each in said], dim=1)

    @staticmethod
    def prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepares the model for its tokenizer, see `scores_at_eos`.

        Raises:
            ValueError: the model is quantized.
        """
        if getattr(model, "is_quantized", False):
            raise ValueError("A reward model cannot be quantized: leave load_in_8bit and load_in_4bit out")
        tokens = model.get_input_embeddings().weight.shape[0]
        needed = scores_at_eos(model.config, tokenizer, tokens)
        if needed > tokens:
            model.resize_token_embeddings(needed, mean_resizing=False)


def scores_at_eos(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, tokens: int) -> int:
    """Makes sure that transformers, too, reads the score of a row at its eos: it takes the last token that is not pad.

    So where pad is eos, the tokenizer gets a new pad token. Returns how many tokens the model must know then, if it now
    knows `tokens`.
    """
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        tokens = max(tokens, tokenizer.pad_token_id + 1)
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.trlx_scores_eos = True  # which tells `trlx.SequenceClassifierReward` to end samples with eos
    return tokens


@register_architecture("seq2seq")
class EncoderDecoder(Architecture):
    """An encoder reads the prompt, a decoder writes the response after a start token.

    The encoder's rows are right-padded in training and in sampling, so its positions are the same in both.

    Raises:
        ValueError: the model's config has no ``decoder_start_token_id``.
    """

    loader = AutoModelForSeq2SeqLM

    def __init__(self, model: PreTrainedModel, adapter: nn.Module | None = None):
        super().__init__(model, adapter)
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
        """The encoder's arguments for prompts [B, S] and their int64 mask."""
        return {"input_ids": tokens, "attention_mask": mask}

    def decoder_inputs(self, tokens: Tensor) -> dict[str, Any]:
        """The decoder's arguments for its rows [B, T]."""
        return {"input_ids": tokens}

    def whole_logits(self, tokens: Tensor) -> Tensor:
        whole, mask = self.adapter or self.model, torch.ones_like(tokens)
        return whole(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens, use_cache=False).logits

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        starts = torch.full((len(prompts), 1), self.start_id)
        return {**self.encoder_inputs(*right_pad(prompts, pad_id)), "decoder_input_ids": starts}, 1

    def row_format(self, tokenizer: PreTrainedTokenizerBase) -> RowFormat:
        return EncoderDecoderRows(self.start_id, tokenizer.sep_token or "<sep>")


def architecture_for(
    model_path: str | PretrainedConfig, arch_type: str, options: Mapping[str, Any], score_head: bool = False
) -> type[Architecture]:
    """The class registered as `arch_type`; `EncoderDecoder` where that is "causal" but the model has an encoder.

    Args:
        arch_type: ``model.model_arch_type``.
        options: ``model.model_extra_configs``; their `FROM_HUB` keys are used to read the model's config.
        score_head: as in ``ModelNeeds``; then it is `Scored`.

    Raises:
        ValueError: the class does not fit the model, or is not registered.
    """
    asked = architectures.get(arch_type)
    if score_head and asked is not Causal:
        raise ValueError(f"model.model_arch_type is {arch_type!r}, but a reward model needs causal")
    asked = Scored if score_head else asked
    try:
        where = {name: value for name, value in options.items() if name in FROM_HUB}
        is_config = isinstance(model_path, PretrainedConfig)
        config = model_path if is_config else AutoConfig.from_pretrained(model_path, **where)
    except (OSError, ValueError):  # `load_model` fails too, and says why
        return asked
    if score_head and (config.is_encoder_decoder or not _has_classifier(config)):
        kind = "has an encoder" if config.is_encoder_decoder else "has no classifier in transformers"
        raise ValueError(f"A model of the type {config.model_type} {kind}, so it cannot be a reward model")
    if config.is_encoder_decoder and asked is Causal:
        logger.info(f"The model ({config.model_type}) has an encoder: model.model_arch_type is read as seq2seq")
        return EncoderDecoder
    if config.is_encoder_decoder != issubclass(asked, EncoderDecoder):
        has = "have an encoder: write seq2seq" if config.is_encoder_decoder else "have no encoder: write causal"
        raise ValueError(f"model.model_arch_type is {arch_type!r}, but {config.model_type} models {has}")
    return asked


def _has_classifier(config: PretrainedConfig) -> bool:
    return type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or hasattr(config, "auto_map")


FROM_HUB = (*WHICH_FILES, "trust_remote_code", "code_revision")
"""Arguments of ``from_pretrained`` that say where a config is read from."""
