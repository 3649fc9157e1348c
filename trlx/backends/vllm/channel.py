"""The way of weights from the trainer's main process to the workers of one vLLM server."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, as_completed
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import TCPStore

from trlx.backends.vllm.inside.trlx_vllm.wire import broadcast, join, packed
from trlx.backends.vllm.server import Description, Server
from trlx.backends.vllm.threads import Threads

CHUNK = 256 * 2**20
"""Bytes of weights that travel at once."""
LONGEST_MEETING = 120
"""Seconds in which the server's workers must have joined the group."""


def chunks(weights: Iterable[tuple[str, Tensor]], limit: int = CHUNK) -> Iterator[dict[str, Tensor]]:
    """The weights in pieces of at most `limit` bytes, or of one tensor that is larger."""
    chunk: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        if chunk and size + tensor.nbytes > limit:
            yield chunk
            chunk, size = {}, 0
        chunk[name] = tensor
        size += tensor.nbytes
    if chunk:
        yield chunk


def _rounded(chunk: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same weights as the server holds them; numbers that are not floats stay."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in chunk.items()}


class Broadcast:
    """Weights that are broadcast over a process group, of gloo or NCCL, that the server's workers join.

    Args:
        host: this machine's name or address, as the server reaches it.
        owner: names this run.
    """

    def __init__(
        self, server: Server, about: Description, kind: str, device: torch.device, host: str | None, owner: str
    ):
        self.server, self.device = server, device if kind == "nccl" else torch.device("cpu")
        self.dtype = getattr(torch, about.dtype)
        self.threads = Threads(2)
        patience = timedelta(seconds=min(server.patience, LONGEST_MEETING))
        size = 1 + about.workers
        self.store = TCPStore("0.0.0.0", 0, size, is_master=True, wait_for_workers=False, timeout=patience)
        meeting = {"host": host or _own_address(server.url), "port": self.store.port, "size": size, "kind": kind}
        info = {**meeting, "owner": owner, "patience": patience.total_seconds()}
        joined = self._tell("init_weight_transfer_engine", {"init_info": info})
        group = self.threads.submit(join, self.store, 0, size, kind, patience)
        for done in as_completed((joined, group)):
            done.result()
        self.group: Any = group.result()

    def begin(self) -> None:
        """Tells the server that weights will come. Requests that it is working on are finished first."""
        self.server.control("pause", mode="wait")
        self.server.control("start_weight_update")

    def send(self, chunk: dict[str, Tensor]) -> None:
        """Sends some weights."""
        tensors = list(_rounded(chunk, self.dtype).values())
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
        shapes = [list(tensor.shape) for tensor in tensors]
        told = self._tell("update_weights", {"update_info": {"names": list(chunk), "dtypes": dtypes, "shapes": shapes}})
        sent = broadcast(self.group, packed(tensors, self.device))
        while not (sent.is_completed() and told.done()):
            if told.done():
                told.result()
            time.sleep(0.001)
        told.result()
        sent.wait()

    def end(self) -> None:
        """Lets the server sample from the new weights, without what its cache holds of the old ones."""
        self.server.control("finish_weight_update")
        resume(self.server)

    def close(self) -> None:
        """Leaves the group, also in the middle of a transfer."""
        self.group.abort()
        self.threads.close()

    def _tell(self, path: str, body: dict[str, Any]) -> Future:
        """Sends a request that the server answers after its workers have met this process."""
        return self.threads.submit(self.server.control, path, body)


class Folder:
    """Weights that are written into a folder on a disk that the server reads, too. `owner` names this run."""

    def __init__(self, server: Server, about: Description, folder: str, owner: str):
        self.server, self.dtype, self.owner = server, getattr(torch, about.dtype), owner
        self.folder = Path(folder).expanduser().resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files = 0

    def begin(self) -> None:
        """Removes what an earlier version left."""
        for file in self.folder.glob("*.safetensors"):
            file.unlink()
        self.files = 0

    def send(self, chunk: dict[str, Tensor]) -> None:
        """Writes some weights. vLLM reads all files of the folder."""
        tensors = {name: tensor.contiguous() for name, tensor in _rounded(chunk, self.dtype).items()}
        save_file(tensors, self.folder / f"part-{self.files:05d}.safetensors")
        self.files += 1

    def end(self) -> None:
        """Lets the server read the files, which are whole now: it would not survive a broken one."""
        self.server.control("pause", mode="wait")
        self.server.control("collective_rpc", {"method": "trlx_follow", "kwargs": {"owner": self.owner}})
        self.server.control(
            "collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        )
        resume(self.server)

    def close(self) -> None:
        """Leaves the folder as it is."""


def resume(server: Server) -> None:
    """Forgets the states of the old weights, and goes on."""
    if not server.control("reset_prefix_cache").get("success", True):
        raise ConnectionError(f"{server.url} did not reset its prefix cache")
    server.control("resume")


def _own_address(url: str) -> str:
    """An address of this machine as `url`'s machine sees it."""
    parts = urlsplit(url)
    # UDP: no packet is sent, but the system chooses the network that leads there
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]
