"""Starts functions in processes of their own, alone or as the ranks of one job."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])


def start(size: int, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[BaseProcess]:
    """`fn(*args, **kwargs)` as a job of `size` processes that find each other through the usual environment."""
    port = _free_port()
    ranks = [
        CONTEXT.Process(target=_as_rank, args=(rank, size, port, fn, args, kwargs), daemon=True) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks


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


def _as_rank(rank: int, size: int, port: int, fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
    if size > 1:
        job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update(
            {name: str(value) for name, value in job.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1"
        )
    fn(*args, **kwargs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
