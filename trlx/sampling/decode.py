"""Sampling from a Hugging Face model with a loop of our own."""

from __future__ import annotations

from collections import deque
from functools import cached_property

import torch

from trlx import logging
from trlx.batch import Sample
from trlx.models.architecture import Causal
from trlx.models.cached import Reader, why_unreadable
from trlx.models.heads import ValueHead
from trlx.sampling.drawing import HELD, Drawing, equal_prompts, uniforms
from trlx.sampling.generate import TransformersSampler
from trlx.sampling.rules import KNOWN
from trlx.sampling.settings import SamplingConfig

logger = logging.get_logger(__name__)

FORCED = ("forced_bos_token_id", "forced_eos_token_id")
"""Settings of a model's ``generation_config`` that change its sequences."""
FREE = 0.25
"""Prompts that wait are read when this share of the places is free."""


class DecodingSampler(TransformersSampler):
    """Samples from the weights that train, without work for equal prompts, for padding and for rows that have ended.

    Args:
        places: the most rows that are held at once; prompts wait until rows have ended. None: as many as are asked for.

    Each call takes one number from torch's generator as a seed. From it, row i has its own random numbers, so what it
    draws does not depend on the rows beside it. ``generate`` samples where the model or a setting needs it.
    """

    exact = True

    def __init__(self, *args, places: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if places is not None and not (type(places) is int and places > 0):
            raise ValueError(f"train.sampler.places must be a whole number of at least 1, got {places!r}")
        self.places = places
        self._told: set[str] = set()

    def _samples(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        reason = self._setting_of_generate(sampling) or self._model_of_generate
        if reason is None:
            return self._decoded(prompts, sampling)
        if reason not in self._told:
            self._told.add(reason)
            logger.info(f"transformers' generate draws the samples, because {reason}")
        size = self.places or len(prompts)
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [sample for part in parts for sample in super(DecodingSampler, self)._samples(part, sampling)]

    def _decoded(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        seed, steps = int(torch.randint(2**62, ())), sampling.max_new_tokens
        drawing = Drawing(sampling, prompts, uniforms(seed, len(prompts), steps).to(self.device), self.policy.heads)
        drawing.hold([])
        places = self.places or len(prompts)
        reader, equal = Reader(self.policy.model, self.device), equal_prompts(prompts)
        waiting = deque(rows[start : start + places] for rows in equal for start in range(0, len(rows), places))
        head = self.policy.value_head if isinstance(self.policy.value_head, ValueHead) else None
        while waiting or drawing.held:
            free = places - len(drawing.held)
            taken = _taken(waiting, free) if free >= FREE * places else []
            if taken:
                reader.join([prompts[rows[0]] for rows in taken], [*map(len, taken)])
                drawing.hold([*drawing.held, *(row for rows in taken for row in rows)])
            values = head and head(reader.hidden)
            tokens = drawing.draw(self.policy.logits(reader.hidden).float(), reader.hidden, values)[0]
            full = [drawing.is_full(row) for row in drawing.held]
            ended = [at for at, row in enumerate(drawing.held) if drawing.done[row] or full[at]]
            # the model may have no position for another token of a row that is full
            if any(full) or len(ended) > (1 - HELD) * len(full):
                came = reader.drop(ended)
                drawing.hold([drawing.held[at] for at in came])
                tokens = tokens[came]
            if drawing.held:
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


def _taken(waiting: deque[list[int]], free: int) -> list[list[int]]:
    """Takes from `waiting` what fits in `free` places."""
    taken = []
    while waiting and len(waiting[0]) <= free:
        taken.append(waiting.popleft())
        free -= len(taken[-1])
    return taken
