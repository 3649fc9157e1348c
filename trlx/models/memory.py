"""How much memory there is, and what a pass takes of it."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trlx.models.decoder import probing
from trlx.models.policy import Policy


def free_memory(device: torch.device, processes: int) -> int:
    """The number of bytes that are free on a device for one of `processes`: they share a host, but not their GPUs."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // processes


def room_for_states(setting: str | int, device: torch.device, processes: int) -> tuple[int, int]:
    """The most bytes of kept hidden states (on a device, in main memory) for one of `processes`.

    `setting` is ``train.cache_hidden_states``: with "auto" a quarter of what is free in each, else bytes on the device.
    """
    if setting != "auto":
        return setting, 0
    host = torch.device("cpu")
    return free_memory(device, processes) // 4, 0 if device == host else free_memory(host, processes) // 4


def bytes_per_token(policy: Policy) -> float:
    """What a forward pass keeps for the backward pass, for each token. Reads a few tokens to see it."""
    with probing(policy.model) as tokens, torch.enable_grad():
        # what does not grow with the tokens does not count: weights, and the copies of them that autocast makes
        rows = torch.cat([tokens, tokens.flip(1)])
        return (_kept(policy, rows) - _kept(policy, tokens)) / tokens.numel()


def _kept(policy: Policy, tokens: Tensor) -> int:
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    mask = torch.ones_like(tokens, dtype=torch.bool)
    responses = mask.clone()
    responses[:, 0] = False
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = policy(tokens, mask, responses, tokens, mask)  # held until `found` is counted
    size = sum(storage.nbytes() for storage in found.values())
    del outputs
    return size
