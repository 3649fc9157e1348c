"""Shuffled orders that are a function of a seed and a number, so that nothing about them needs saving."""

from __future__ import annotations

import torch


def permutation(size: int, seed: int, number: int) -> list[int]:
    """The `number`-th shuffled order of ``range(size)`` under `seed`; touches no global random state."""
    # the generator sees 32 bits only: keep neighbouring seeds and numbers apart within them
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randperm(size, generator=generator).tolist()
