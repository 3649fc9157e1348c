"""How weights travel from the trainer to the workers of a vLLM server: both sides import this file, and torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store

ALIGNMENT = 16
"""Each tensor of a chunk begins at a multiple of this many bytes, so that it can be viewed with its own dtype."""


def join(store: Store, rank: int, size: int, kind: str, patience: timedelta) -> Any:
    """A group of `size` processes beside torch's default one, over "gloo" or "nccl"."""
    store = PrefixStore(f"trlx-{kind}", store)
    if kind == "gloo":
        return ProcessGroupGloo(store, rank, size, patience)
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = patience
    return ProcessGroupNCCL(store, rank, size, options)


def broadcast(group: Any, buffer: Tensor) -> Any:
    """Begins to send `buffer` from rank 0, the trainer, to all others, or to receive it there; returns torch's Work."""
    options = BroadcastOptions()
    options.rootRank = 0
    return group.broadcast([buffer], options)


def packed(tensors: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """The bytes of `tensors` behind each other, uint8 [n] on `device`."""
    starts = _starts(tensors)
    buffer = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
    for start, tensor in zip(starts, tensors, strict=False):
        buffer[start : start + tensor.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
    return buffer


def empty(shapes: Sequence[Sequence[int]], dtypes: Sequence[str], device: torch.device | str) -> tuple[Tensor, list]:
    """(a buffer for what `packed` makes of tensors of these shapes, its parts as these tensors)."""
    likes = [
        torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    starts = _starts(likes)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    parts = zip(starts, likes, strict=False)
    return buffer, [buffer[start : start + like.nbytes].view(like.dtype).view(like.shape) for start, like in parts]


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """The first byte of each tensor, and the end."""
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
    return starts
