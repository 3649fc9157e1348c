"""Models whose responses have given lengths, in any sampler."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

PERIOD = 64


class Countdown:
    """While it samples, each id is 1 less than the one before it, modulo `PERIOD`; only eos, the id 0, follows a 1.

    So a prompt whose last id is n modulo `PERIOD`, with n from 1 to ``PERIOD - 1``, gets a response of n tokens, eos
    included. The model decides that from the last token alone: a sampler needs no setting, and may drop, move or repeat
    rows. It samples if it runs with a key-value cache; without one its logits are those of its family. The vocabulary
    holds at least `PERIOD` ids.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.last: Tensor | None = None
        self.base_model.register_forward_pre_hook(self._note, with_kwargs=True)
        self.get_output_embeddings().register_forward_hook(self._forbid)

    @cached_property
    def forbidden(self) -> Tensor:
        """Whether an id (column) may not follow an id that is n modulo `PERIOD` (row n). No buffer, because
        ``from_pretrained`` would leave it empty."""
        ids = torch.arange(self.config.vocab_size)
        table = ids[None] % PERIOD != (torch.arange(PERIOD)[:, None] - 1) % PERIOD
        table[1] = ids != 0
        return table

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        samples = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
        self.last = ids[:, -1] % PERIOD if samples else None

    def _forbid(self, module: nn.Module, args: tuple, logits: Tensor) -> None:
        if self.last is not None and len(logits):
            (logits if logits.ndim == 2 else logits[:, -1]).masked_fill_(self.forbidden[self.last], -torch.inf)


class CountdownGPT2Config(GPT2Config):
    model_type = "countdown_gpt2"
    auto_map = {}  # TRL reads it


class CountdownGPT2(Countdown, GPT2LMHeadModel):
    config_class = CountdownGPT2Config


class CountdownLlamaConfig(LlamaConfig):
    model_type = "countdown_llama"
    auto_map = {}


class CountdownLlama(Countdown, LlamaForCausalLM):
    config_class = CountdownLlamaConfig


for _model in (CountdownGPT2, CountdownLlama):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)
