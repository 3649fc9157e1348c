"""The memory of each phase of training on one process, for both backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PARTS = ("weights", "reference", "optimizer", "gradients", "kept states", "activations", "keys, values", "temporary")
"""What a phase holds. *Kept states* are the outputs of frozen blocks, *activations* wait for the backward pass."""

DRAWING = 4 + 8 + 8
"""Bytes for each logit when a token is drawn: float32, then probabilities and their sums in float64."""


@dataclass(frozen=True)
class Phase:
    """Bytes on one process while it samples, scores, updates or saves."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def peak(phases: list[Phase]) -> Phase:
    """The phase that needs most."""
    return max(phases, key=lambda phase: phase.total)
