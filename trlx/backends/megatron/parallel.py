"""The processes of a run: who holds which part of the model, and who sees which data."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from trlx.backends.base import PATIENCE
from trlx.backends.megatron.settings import Parallel


@dataclass(frozen=True)
class Place:
    """Where this process stands. Tensor ranks are neighbours, then data ranks, then pipeline stages."""

    layout: Parallel
    device: torch.device
    tensor_rank: int
    stage: int
    data_rank: int
    data_size: int
    back: dist.ProcessGroup | None
    """The stages once more, for what goes from the last one to others: NCCL finishes what goes one way between two
    processes before it begins with what goes the other way, unless it is of another group. None where there is one."""

    @property
    def is_main(self) -> bool:
        """The one process that talks to the user."""
        return dist.get_rank() == 0

    @property
    def leads(self) -> bool:
        """The first of the processes that hold the model for one data rank."""
        return self.tensor_rank == 0 and self.stage == 0

    def require(self) -> None:
        """Raises RuntimeError where the processes have been divided otherwise since."""
        if _standing is None or _standing.sizes != _sizes(self.layout):
            raise RuntimeError(
                "This trainer divided the processes in one way, and a later one divided them in another: use a trainer "
                "before the next one with other parallel sizes is built, or load what it saved into a new one"
            )

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """The last stage's `tensor` on every stage; all bring one of the same shape and type."""
        if self.layout.pipeline == 1:
            return tensor
        tensor = tensor.contiguous()  # gloo sends garbage otherwise
        dist.broadcast(tensor, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline_group())
        return tensor

    def object_from_last_stage(self, value: Any) -> Any:
        """The last stage's `value` on every stage."""
        if self.layout.pipeline == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline_group())
        return box[0]

    def from_leader(self, value: Any) -> Any:
        """The value of the leading process of this data rank, on all that hold the model with it."""
        if self.layout.tensor * self.layout.pipeline == 1:
            return value
        box = [value]
        dist.broadcast_object_list(
            box, parallel_state.get_model_parallel_src_rank(), group=parallel_state.get_model_parallel_group()
        )
        return box[0]

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """The sum of a small tensor over data ranks."""
        if self.data_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True).contiguous()
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.cpu()

    def gather_over_data(self, tensor: Tensor) -> Tensor:
        """[data_size, ...]: every data rank's `tensor`."""
        parts = [torch.empty_like(tensor) for _ in range(self.data_size)]
        dist.all_gather(parts, tensor.contiguous(), group=parallel_state.get_data_parallel_group())
        return torch.stack(parts)

    def gather_over_tensor_ranks(self, tensor: Tensor) -> list[Tensor]:
        """Every tensor rank's part, in rank order; all have one shape."""
        if self.layout.tensor == 1:
            return [tensor]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.layout.tensor)]
        dist.all_gather(parts, tensor.contiguous(), group=tensor_group())
        return parts


def arrange(layout: Parallel, seed: int) -> Place:
    """Joins the processes and divides them as `layout` says; ``check_layout`` tells whether it can."""
    join()
    back = _groups_of(layout)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    # hidden units dropped on one stage say nothing about those of another
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * stage)
    return Place(
        layout=layout,
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        stage=stage,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        back=back,
    )


@dataclass(frozen=True)
class _Standing:
    """The process groups there are. Each costs threads and open files: those of a layout serve all its backends."""

    world: dist.ProcessGroup
    sizes: tuple[int, int, int | None]
    back: dist.ProcessGroup | None
    groups: list[dist.ProcessGroup]


_standing: _Standing | None = None


def _sizes(layout: Parallel) -> tuple[int, int, int | None]:
    return layout.tensor, layout.pipeline, layout.virtual


def _groups_of(layout: Parallel) -> dist.ProcessGroup | None:
    """Makes the process groups of a layout the engine's, in the place of those of another one; returns `Place.back`."""
    global _standing
    if _standing is None or _standing.world is not dist.group.WORLD or _standing.sizes != _sizes(layout):
        _give_back()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual,
            distributed_timeout_minutes=int(PATIENCE.total_seconds() // 60),
            create_gloo_process_groups=False,  # for the engine's own checkpoints
        )
        again = _pipelines_again() if layout.pipeline > 1 else None
        made = [*parallel_state._global_process_group_list, again]
        groups = [group for group in made if group is not None]  # None stands for all processes
        _standing = _Standing(dist.group.WORLD, _sizes(layout), again, groups)
    return _standing.back


def _give_back() -> None:
    """Ends the process groups of the layout before; trainers of that layout cannot go on."""
    if _standing is not None and _standing.world is dist.group.WORLD:
        for group in _standing.groups:
            dist.destroy_process_group(group)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    gc.collect()  # a trainer that is no longer used holds its groups until it is found


def tensor_group() -> dist.ProcessGroup:
    """The processes that share every layer."""
    return parallel_state.get_tensor_model_parallel_group()


def pipeline_group() -> dist.ProcessGroup:
    """The processes whose stages make up one model."""
    return parallel_state.get_pipeline_model_parallel_group()


def _pipelines_again() -> dist.ProcessGroup:
    ranks: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, dist.get_process_group_ranks(pipeline_group()))
    pipelines = [list(pipeline) for pipeline in sorted({tuple(each) for each in ranks})]
    return dist.new_subgroups_by_enumeration(pipelines, timeout=PATIENCE)[0]


def join() -> None:
    """Joins the processes that torchrun started, or one alone. Safe to call again."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if dist.is_initialized():
        return
    kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(kind, timeout=PATIENCE)
    else:
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
