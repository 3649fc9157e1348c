"""Counts how often an optimizer step would make the host wait for a GPU. Needs none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trlx.batch import TokenBatch

ON_HOST = (TokenBatch, "rows"), (TokenBatch, "to")
"""What both backends do with a batch before it is on the device."""


class Waits(TorchDispatchMode):
    """Counts operations for which the host waits for a GPU: they make numbers of a tensor, or select by a mask.

    Args:
        on_host: (owner, name) of each function that works with tensors on the host, and waits for nothing.
    """

    names = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *on_host: tuple[Any, str]):
        super().__init__()
        self.found, self.on_host, self.watches = Counter(), False, False
        for owner, name in on_host:
            monkeypatch.setattr(owner, name, self._unwatched(getattr(owner, name)))
        tolist = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda x: self._count("tolist") or tolist(x))

    def __enter__(self):
        self.watches = True
        return super().__enter__()

    def __exit__(self, *raised):
        self.watches = False
        return super().__exit__(*raised)

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        name = fn.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.names or any(x is not None and x.dtype == torch.bool for x in indices):
            self._count(name)
        return fn(*args, **(kwargs or {}))

    def _count(self, name: str) -> None:
        if self.watches and not self.on_host:
            self.found[name] += 1

    def _unwatched(self, function):
        def call(*args, **kwargs):
            before, self.on_host = self.on_host, True
            try:
                return function(*args, **kwargs)
            finally:
                self.on_host = before

        return call
