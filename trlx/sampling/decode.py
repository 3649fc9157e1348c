"""Sampling from a Hugging Face model with a loop of our own."""

from __future__ import annotations

from functools import cached_property

import torch

from trlx import logging
from trlx.batch import Sample
from trlx.models.architecture import Causal
from trlx.models.cached import Reader, why_unreadable
from trlx.models.heads import ValueHead
from trlx.sampling.drawing import Drawing, uniforms
from trlx.sampling.generate import TransformersSampler
from trlx.sampling.rules import KNOWN
from trlx.sampling.settings import SamplingConfig

logger = logging.get_logger(__name__)

FORCED = ("forced_bos_token_id", "forced_eos_token_id")
"""Settings of a model's ``generation_config`` that change its sequences."""
HELD = 0.75
"""Rows that have ended leave the batch when less than this share of it goes on."""


class DecodingSampler(TransformersSampler):
    """Samples from the weights that train, without work for equal prompts, for padding and for rows that have ended.

    Each call takes one number from torch's generator as a seed. From it, row i has its own random numbers, so what it
    draws does not depend on the rows beside it. ``generate`` samples where the model or a setting needs it.
    """

    exact = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._told: set[str] = set()

    def _samples(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        reason = self._setting_of_generate(sampling) or self._model_of_generate
        if reason is None:
            return self._decoded(prompts, sampling)
        if reason not in self._told:
            self._told.add(reason)
            logger.info(f"transformers' generate draws the samples, because {reason}")
        return super()._samples(prompts, sampling)

    def _decoded(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        seed, steps = int(torch.randint(2**62, ())), sampling.max_new_tokens
        reader = Reader(self.policy.model, prompts, self.device)
        drawing = Drawing(sampling, prompts, uniforms(seed, len(prompts), steps).to(self.device), self.policy.heads)
        drawing.hold(reader.order)
        head = self.policy.value_head if isinstance(self.policy.value_head, ValueHead) else None
        while True:
            values = head and head(reader.hidden)
            tokens = drawing.draw(self.policy.logits(reader.hidden).float(), reader.hidden, values)[0]
            going = [at for at, row in enumerate(drawing.held) if not drawing.done[row]]
            if not going or drawing.step == steps:
                break
            if len(going) < HELD * len(drawing.held):
                drawing.hold([drawing.held[at] for at in going])
                reader.keep(going)
                tokens = tokens[going]
            reader.step(tokens)
        return [drawing.sample(row, self.version) for row in range(len(prompts))]

    def _setting_of_generate(self, sampling: SamplingConfig) -> str | None:
        """Which setting only ``generate`` knows, in words."""
        ones = ("num_beams", "num_return_sequences")
        for name, value in sampling.extra.items():
            if not (name in KNOWN or value is None or value is False or (name in ones and value == 1)):
                return f"{sampling.where}.{name} has no rule in trlx"
        return None

    @cached_property
    def _model_of_generate(self) -> str | None:
        """Why only ``generate`` samples from this model."""
        model, architecture = self.policy.model, self.policy.architecture
        reason = None
        if type(architecture).sampler_inputs is not Causal.sampler_inputs:
            reason = "reads more than the tokens of one row"
        elif self.device.type == "mps":
            reason = "is on a device without 64-bit numbers"
        elif any(getattr(model.generation_config, name, None) is not None for name in FORCED):
            reason = f"has {' or '.join(FORCED)} in its generation_config"
        reason = reason or why_unreadable(model, self.device)
        return reason and f"{type(model).__name__} {reason}"
