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
    """Each id is 1 less than the one before it, modulo `PERIOD`; only eos, the id 0, follows a 1. The ids of one class
    are as likely as in the model's family.

    So a prompt whose last id is n modulo `PERIOD`, with n from 1 to ``PERIOD - 1``, gets a response of n tokens, eos
    included. What follows an id that is 0 modulo `PERIOD` is free. The vocabulary holds at least `PERIOD` ids.

    Samplers and trainers need no setting. They may call the model, or the trunk and later the head, on other rows in
    another order: the head recognises a place by its hidden state.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.read: dict[tuple[float, ...], int] = {}
        """The id, modulo `PERIOD`, at each place by the beginning of its hidden state."""
        self.base_model.register_forward_hook(self._note, with_kwargs=True)
        self.get_output_embeddings().register_forward_hook(self._forbid)

    @cached_property
    def forbidden(self) -> Tensor:
        """float32, -1e4 where an id (column) may not follow an id that is n modulo `PERIOD` (row n), else 0. No buffer,
        because ``from_pretrained`` would leave it empty."""
        ids = torch.arange(self.config.vocab_size)
        table = ids[None] % PERIOD != (torch.arange(PERIOD)[:, None] - 1) % PERIOD
        table[0], table[1] = False, ids != 0
        return torch.zeros(table.shape).masked_fill_(table, -1e4)

    def _note(self, trunk: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("past_key_values") is None and not kwargs.get("use_cache"):
            self.read.clear()
        ids = args[0] if args else kwargs["input_ids"]
        self.read.update(zip(_keys(output[0]), (ids % PERIOD).flatten().tolist(), strict=True))

    def _forbid(self, head: nn.Module, args: tuple[Tensor], logits: Tensor) -> None:
        ids = [self.read.get(key, 0) for key in _keys(args[0])]
        with torch.no_grad():
            for row, n in zip(logits.view(-1, logits.shape[-1]), ids, strict=True):
                row.add_(self.forbidden[n])


def _keys(hidden: Tensor) -> list[tuple[float, ...]]:
    """What tells the places of [..., d] apart."""
    return [tuple(place) for place in hidden[..., :4].flatten(0, -2).tolist()]


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
