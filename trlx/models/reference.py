"""The reference policy without a second model, and a hash of the weights that it started from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trlx.models.policy import Policy

_INTEGER_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES = 64

Exchange = Callable[[Tensor, Tensor], None]
"""Swaps the values of a weight and of its copy."""


def exchange_pointers(weight: Tensor, other: Tensor) -> None:
    """Swaps two pointers and copies nothing; optimizer and DDP still hold the same weights."""
    weight.data, other.data = other.data, weight.data


class Reference:
    """The first values of the trainable weights of the language model, which replace them inside `active`.

    The reference is the same module, so it is exact for any architecture, any freezing rule and tied weights. Its only
    memory is one copy of the weights that train. Make it when the policy is on its device.
    """

    def __init__(self, policy: Policy, exchange: Exchange = exchange_pointers):
        self._exchange_weights = exchange
        self._live = [weight for weight in policy.model.parameters() if weight.requires_grad]
        self._kept = [weight.detach().clone() for weight in self._live]
        self._is_active = False

    def is_first_policy(self) -> bool:
        """Whether the reference is the policy that training starts from."""
        return True

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the policy's language model has its first weights; the heads stay.

        Raises:
            RuntimeError: the block is entered twice.
        """
        if self._is_active:
            raise RuntimeError("The reference is already active.")
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for weight, other in zip(self._live, self._kept, strict=True):
            self._exchange_weights(weight, other)
        self._is_active = not self._is_active


def digest(policy: Policy) -> str:
    """A short hash of the language model's weights, without heads: the same on any device, with any number of threads.

    It covers all names, shapes and dtypes, the exact sum of the bits of each tensor, and `_SAMPLES` of its values.
    """
    found = hashlib.sha256()
    for name, weight in policy.model.named_parameters():
        values = _as_integers(weight.detach())
        bits = [sum_of_bits(values), *values[:: max(1, len(values) // _SAMPLES)].tolist()]
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype} {bits}".encode())
    return found.hexdigest()[:16]


def sum_of_bits(value: Tensor) -> int:
    """The sum of the bits as integers. Unlike a sum of floats it does not depend on the order."""
    return int(_as_integers(value).sum(dtype=torch.int64))


def _as_integers(value: Tensor) -> Tensor:
    return value.flatten().view(_INTEGER_OF_WIDTH[value.element_size()])
