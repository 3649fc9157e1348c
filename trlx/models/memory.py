"""How much memory there is, and what a pass takes of it."""

from __future__ import annotations

from itertools import chain

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks

from trlx.models.decoder import probing
from trlx.models.policy import Policy


def free_memory(device: torch.device, processes: int) -> int:
    """The number of bytes that are free on a device for one of `processes`: they share a host, but not their GPUs."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // processes


def bytes_per_token(policy: Policy) -> float:
    """What a forward pass keeps for the backward pass, for each token. Reads a few tokens to see it."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with probing(policy.model) as tokens, torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        mask = torch.ones_like(tokens, dtype=torch.bool)
        responses = mask.clone()
        responses[:, 0] = False
        outputs = policy(tokens, mask, responses, tokens, mask)  # held until `kept` is counted
    for own in chain(policy.parameters(), policy.buffers()):
        kept.pop(own.untyped_storage().data_ptr(), None)
    del outputs
    return sum(storage.nbytes() for storage in kept.values()) / tokens.numel()
