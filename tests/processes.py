"""Starts functions in processes of their own, alone or as the ranks of one job."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])


class Job(list[BaseProcess]):
    """The processes of a job, and the store where they meet, which, as torchrun's, outlives each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))

    def environment(self, rank: int, size: int) -> dict[str, str]:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": 1}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        return {name: str(value) for name, value in {**names, **meeting}.items()}


def start(size: int, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Job:
    """`fn(*args, **kwargs)` as a job of `size` processes that find each other through the usual environment."""
    job = Job()
    for rank in range(size):
        environment = job.environment(rank, size) if size > 1 else {}
        job.append(CONTEXT.Process(target=_as_rank, args=(environment, fn, args, kwargs), daemon=True))
    for process in job:
        process.start()
    return job


def finish(ranks: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Waits for the processes; when one fails the others, which would wait for it forever, are killed. Exit codes."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in ranks):
            ranks[0].join(5)
            break
        time.sleep(0.02)
    kill(ranks)
    return [process.exitcode for process in ranks]


def ends(ranks: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Exit codes of processes that end by themselves, those that do not within `timeout` seconds -9."""
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    kill(ranks)
    return [process.exitcode for process in ranks]


def kill(ranks: list[BaseProcess]) -> None:
    """SIGKILL for all that still run."""
    for process in ranks:
        if process.is_alive():
            process.kill()
    for process in ranks:
        process.join()


def together(size: int, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Runs a job to its end; fails if a process did."""
    assert finish(start(size, fn, *args, **kwargs)) == [0] * size


def _as_rank(environment: dict[str, str], fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
    os.environ.update(environment)
    fn(*args, **kwargs)
