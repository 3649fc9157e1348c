"""What a vLLM server loads to follow a policy that trains; it needs no trlx for that, see `trlx vllm`.

``--worker-extension-cls`` names `Follower`. Importing this file registers the way of weights that
``--weight-transfer-config '{"backend": "trlx"}'`` asks for.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from .wire import broadcast, empty, join

INSTANCE = uuid.uuid4().hex
"""Names this process. A server that was started again has another one, and the weights that it was started with."""


@dataclass
class Joining(WeightTransferInitInfo):
    """Where the workers meet the trainer: `size` processes in all. `owner` names the trainer's run."""

    host: str
    port: int
    size: int
    kind: str
    owner: str
    patience: float


@dataclass
class Chunk(WeightTransferUpdateInfo):
    """The tensors of one broadcast, in order."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class BroadcastEngine(NCCLWeightTransferEngine):
    """Receives chunks of weights under their Hugging Face names. vLLM's own class loads them layer by layer."""

    init_info_cls, update_info_cls = Joining, Chunk
    supports_draft_weight_update = False
    owner: str | None = None
    group: Any = None

    def init_transfer_engine(self, init_info: Joining) -> None:
        """Joins the trainer's group, in place of an older one."""
        self.shutdown()
        ranks, patience = self.parallel_config, timedelta(seconds=init_info.patience)
        rank = 1 + ranks.data_parallel_index * ranks.world_size + ranks.rank
        store = TCPStore(init_info.host, init_info.port, is_master=False, timeout=patience)
        self.group = join(store, rank, init_info.size, init_info.kind, patience)
        BroadcastEngine.owner = init_info.owner

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives one chunk and loads it."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Chunk) -> None:
        """Receives the bytes of all tensors at once, and loads each under its name."""
        buffer, tensors = empty(update_info.shapes, update_info.dtypes, self.device)
        broadcast(self.group, buffer).wait()
        self.model.load_weights(list(zip(update_info.names, tensors, strict=True)))

    def shutdown(self) -> None:
        """Leaves the trainer's group, also in the middle of a transfer."""
        if self.group is not None:
            self.group.abort()
        self.group, BroadcastEngine.owner = None, None


class Follower:
    """A worker extension: says what the server samples from."""

    def trlx_describe(self) -> dict[str, Any]:
        """Called through ``/collective_rpc``."""
        config, model = self.vllm_config, self.vllm_config.model_config
        return {
            "instance": INSTANCE,
            "owner": BroadcastEngine.owner,
            "workers": config.parallel_config.world_size_across_dp,
            "vocab_size": model.get_vocab_size(),
            "max_model_len": model.max_model_len,
            "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def trlx_follow(self, owner: str) -> None:
        """The weights are those of this run from now on; called for weights that come from a folder."""
        BroadcastEngine.owner = owner


WeightTransferEngineFactory.register_engine("trlx", BroadcastEngine)
