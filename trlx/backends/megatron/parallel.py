"""The processes of a run: which shard of the model each holds, and which rows it sees."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from trlx.backends.base import PATIENCE
from trlx.backends.megatron.settings import ParallelSizes


@dataclass(frozen=True)
class ParallelState:
    """This process's ranks and groups. Neighbouring processes are tensor ranks, then data ranks, then stages."""

    sizes: ParallelSizes
    device: torch.device
    tensor_rank: int
    stage: int
    data_rank: int
    data_size: int
    return_group: dist.ProcessGroup | None
    """A second group of the same stages, for messages from the last stage. Within one group NCCL runs the messages
    between two processes one after the other, whatever their direction. None with a single stage."""

    @property
    def is_main(self) -> bool:
        """True on one process, which prints and writes shared files."""
        return dist.get_rank() == 0

    @property
    def leads(self) -> bool:
        """True on the first process of each data rank."""
        return self.tensor_rank == 0 and self.stage == 0

    def require_groups(self) -> None:
        """Raises RuntimeError after a later trainer has made process groups of other sizes."""
        if _groups is None or _groups.key != _key(self.sizes):
            raise RuntimeError(
                "This trainer's process groups are gone, because a later trainer has other parallel sizes: use this "
                "trainer before you build the next one, or load its checkpoint into a new trainer"
            )

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """The last stage's `tensor` on every stage. Every stage passes a tensor of that shape and type."""
        if self.sizes.pipeline == 1:
            return tensor
        tensor = tensor.contiguous()  # gloo sends wrong values of other tensors
        dist.broadcast(tensor, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline_group())
        return tensor

    def object_from_last_stage(self, value: Any) -> Any:
        """The last stage's `value` on every stage."""
        if self.sizes.pipeline == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline_group())
        return box[0]

    def from_leader(self, value: Any) -> Any:
        """The value of this data rank's first process, on all processes of the data rank."""
        if self.sizes.tensor * self.sizes.pipeline == 1:
            return value
        box = [value]
        dist.broadcast_object_list(
            box, parallel_state.get_model_parallel_src_rank(), group=parallel_state.get_model_parallel_group()
        )
        return box[0]

    def to_first_stage(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The named CPU tensors of all stages, on the first stage alone. Tensor rank 0 of data rank 0 sends and gets
        them; on the other processes `tensors` must be empty. Every process iterates to the end."""
        source = parallel_state.get_pipeline_model_parallel_first_rank()
        if self.stage == 0:
            yield from tensors
            takes_part = self.tensor_rank == self.data_rank == 0
            for stage in dist.get_process_group_ranks(pipeline_group())[1:] if takes_part else ():
                yield from self._received(stage)
            return
        for name, tensor in tensors:
            dist.send_object_list([(name, tensor.shape, tensor.dtype)], source, group=pipeline_group())
            dist.send(tensor.to(self.device).contiguous(), source, group=pipeline_group())
        if self.tensor_rank == self.data_rank == 0:
            dist.send_object_list([None], source, group=pipeline_group())

    def _received(self, stage: int) -> Iterator[tuple[str, Tensor]]:
        """What `to_first_stage` sends from a process."""
        box: list[Any] = [None]
        while True:
            dist.recv_object_list(box, stage, group=pipeline_group())
            if box[0] is None:
                return
            name, shape, dtype = box[0]
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            dist.recv(tensor, stage, group=pipeline_group())
            yield name, tensor.cpu()

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """The sum of a small tensor over data ranks."""
        if self.data_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True).contiguous()
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.cpu()

    def gather_over_data(self, tensor: Tensor) -> Tensor:
        """[data_size, ...]: every data rank's `tensor`."""
        shards = [torch.empty_like(tensor) for _ in range(self.data_size)]
        dist.all_gather(shards, tensor.contiguous(), group=parallel_state.get_data_parallel_group())
        return torch.stack(shards)

    def gather_over_tensor_ranks(self, tensor: Tensor) -> list[Tensor]:
        """The shards of all tensor ranks, in rank order. All shards have one shape."""
        if self.sizes.tensor == 1:
            return [tensor]
        shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.sizes.tensor)]
        dist.all_gather(shards, tensor.contiguous(), group=tensor_group())
        return shards


def initialize(sizes: ParallelSizes, seed: int) -> ParallelState:
    """Joins the processes and makes the process groups for `sizes`, which ``check_sizes`` has checked."""
    join()
    return_group = _make_groups(sizes)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    # seed dropout per pipeline stage
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * stage)
    return ParallelState(
        sizes=sizes,
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        stage=stage,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        return_group=return_group,
    )


@dataclass(frozen=True)
class _Groups:
    """The current process groups. Backends of the same sizes share them, as each costs threads and open files."""

    world: dist.ProcessGroup
    key: tuple[int, int, int | None]
    return_group: dist.ProcessGroup | None
    groups: list[dist.ProcessGroup]


_groups: _Groups | None = None


def _key(sizes: ParallelSizes) -> tuple[int, int, int | None]:
    return sizes.tensor, sizes.pipeline, sizes.virtual


def _make_groups(sizes: ParallelSizes) -> dist.ProcessGroup | None:
    """Makes Megatron-Core's process groups unless they exist; returns ``ParallelState.return_group``."""
    global _groups
    if _groups is None or _groups.world is not dist.group.WORLD or _groups.key != _key(sizes):
        _destroy_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor,
            pipeline_model_parallel_size=sizes.pipeline,
            virtual_pipeline_model_parallel_size=sizes.virtual,
            distributed_timeout_minutes=int(PATIENCE.total_seconds() // 60),
            create_gloo_process_groups=False,  # only Megatron-Core's own checkpoints need them
        )
        second = _second_pipeline_group() if sizes.pipeline > 1 else None
        made = [*parallel_state._global_process_group_list, second]
        groups = [group for group in made if group is not None]  # None stands for all processes
        _groups = _Groups(dist.group.WORLD, _key(sizes), second, groups)
    return _groups.return_group


def _destroy_groups() -> None:
    """Destroys the current groups. Trainers that used them cannot go on."""
    if _groups is not None and _groups.world is dist.group.WORLD:
        for group in _groups.groups:
            dist.destroy_process_group(group)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    gc.collect()  # an unused trainer keeps its groups until it is collected


def tensor_group() -> dist.ProcessGroup:
    """The tensor ranks of this stage, which share every layer."""
    return parallel_state.get_tensor_model_parallel_group()


def pipeline_group() -> dist.ProcessGroup:
    """The stages of one model, for this tensor rank."""
    return parallel_state.get_pipeline_model_parallel_group()


def _second_pipeline_group() -> dist.ProcessGroup:
    ranks: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, dist.get_process_group_ranks(pipeline_group()))
    pipelines = [list(pipeline) for pipeline in sorted({tuple(each) for each in ranks})]
    return dist.new_subgroups_by_enumeration(pipelines, timeout=PATIENCE)[0]


def join() -> None:
    """Initializes torch.distributed: with torchrun's processes, or with this process alone. Safe to call again."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if dist.is_initialized():
        return
    kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(kind, timeout=PATIENCE)
    else:
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
