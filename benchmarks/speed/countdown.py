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
    included. It samples if it runs with a key-value cache; without one its logits are those of its family. The
    vocabulary holds at least `PERIOD` ids.

    A sampler needs no setting. It may call the model, or the trunk and later the head, on other rows in another order:
    the head recognises a row by its hidden state.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.read: dict[tuple[float, ...], int] = {}
        """The last id, modulo `PERIOD`, by the beginning of the hidden state after it."""
        self.base_model.register_forward_hook(self._note, with_kwargs=True)
        self.get_output_embeddings().register_forward_hook(self._forbid)

    @cached_property
    def forbidden(self) -> Tensor:
        """Whether an id (column) may not follow an id that is n modulo `PERIOD` (row n). No buffer, because
        ``from_pretrained`` would leave it empty."""
        ids = torch.arange(self.config.vocab_size)
        table = ids[None] % PERIOD != (torch.arange(PERIOD)[:, None] - 1) % PERIOD
        table[1] = ids != 0
        return table

    def _note(self, trunk: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not (kwargs.get("use_cache") or kwargs.get("past_key_values") is not None):
            self.read.clear()
            return
        ids = args[0] if args else kwargs["input_ids"]
        self.read.update(zip(_keys(output[0][:, -1]), (ids[:, -1] % PERIOD).tolist(), strict=True))

    def _forbid(self, head: nn.Module, args: tuple[Tensor], logits: Tensor) -> None:
        hidden, last = (each if each.ndim == 2 else each[:, -1] for each in (args[0], logits))
        if self.read and len(hidden):
            last.masked_fill_(self.forbidden[[self.read[key] for key in _keys(hidden)]], -torch.inf)


def _keys(hidden: Tensor) -> list[tuple[float, ...]]:
    """What tells the rows of [B, d] apart."""
    return [tuple(row) for row in hidden[:, :4].tolist()]


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
