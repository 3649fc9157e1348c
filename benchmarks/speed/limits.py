"""What the machine can do at most, measured beside the runs: other work on it changes these numbers, too."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def limits() -> dict[str, float]:
    """GFLOPS of a float32 matrix product, and GB/s of a copy (bytes read and written), per CPU second of one thread."""
    left, right = torch.rand(1024, 1024), torch.rand(1024, 1024)
    product = torch.empty(1024, 1024)
    source = torch.rand(2**26)
    target = torch.zeros_like(source)
    return {
        "matmul_gflops": 2 * 1024**3 / 1e9 / _shortest(lambda: torch.mm(left, right, out=product), 20),
        "copy_gb_per_second": 2 * 4 * 2**26 / 1e9 / _shortest(lambda: target.copy_(source), 5),
    }


def _shortest(fn: Callable[[], object], times: int) -> float:
    fn()
    found = []
    for _ in range(times):
        began = time.process_time()
        fn()
        found.append(time.process_time() - began)
    return min(found)
