"""The memory of each phase of training on one process, for both backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PARTS = ("weights", "reference", "optimizer", "gradients", "kept states", "activations", "keys, values", "temporary")
"""What a phase holds. *Kept states* are the outputs of frozen blocks, *activations* wait for the backward pass."""


@dataclass(frozen=True)
class Phase:
    """Bytes on one process while it samples, scores, updates or saves."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())
