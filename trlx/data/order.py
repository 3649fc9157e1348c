"""Shuffled orders that are a function of a seed, a name and a number, so that nothing about them needs saving."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


@lru_cache(maxsize=2)  # one of prompts and one of rows, each read from end to end
def permutation(size: int, seed: int, stream: str, number: int) -> tuple[int, ...]:
    """The `number`-th shuffled order of ``range(size)`` under `seed`; touches no global random state.

    Args:
        stream: what is ordered, e.g. ``"prompts"``: another thing of the same size gets another order.
    """
    # the generator sees 32 bits only, and neighbouring seeds and numbers must be apart within them
    digest = hashlib.sha256(f"{seed} {stream} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return tuple(torch.randperm(size, generator=generator).tolist())
