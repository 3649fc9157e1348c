"""The frozen reference policy without a second model, and a fingerprint of the weights it started from."""

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
"""Makes a weight and another value of it change places."""


def exchange_pointers(weight: Tensor, other: Tensor) -> None:
    """Two pointers change hands and nothing is copied; optimizer and DDP still hold the same weights."""
    weight.data, other.data = other.data, weight.data


class Reference:
    """The first values of the language model's trainable weights, to be put in their place for a while.

    The reference is the very same module, so any architecture, any freezing rule and tied weights are exact, and the
    only memory taken is one copy of the weights that train. Make it when the policy is on its device.
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
        """Inside the block the policy's language model has its first weights; its heads stay as they are.

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
    """A short hash of the language model's weights as they are now, heads left out: all names, shapes and dtypes, the
    exact sum of the bits of each tensor, and some of its values. The same on any device and with any number of threads.
    """
    found = hashlib.sha256()
    for name, weight in policy.model.named_parameters():
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype} {_bits(weight.detach())}".encode())
    return found.hexdigest()[:16]


def _bits(value: Tensor) -> list[int]:
    bits = _as_integers(value)
    stride = max(1, len(bits) // _SAMPLES)
    return [sum_of_bits(value), *bits[::stride].tolist()]


def sum_of_bits(value: Tensor) -> int:
    """The sum of the bit patterns as integers: unlike a sum of floats it has one result in any order."""
    return int(_as_integers(value).sum(dtype=torch.int64))


def _as_integers(value: Tensor) -> Tensor:
    return value.flatten().view(_INTEGER_OF_WIDTH[value.element_size()])
