"""Where weights are: on every process all of them, or a part of each (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from trlx.models.decoder import block_lists, probing
from trlx.models.policy import Policy
from trlx.models.reference import Exchange, exchange_pointers

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
"""How ``accelerate launch`` tells its processes what it is configured for."""

MakeOptimizer = Callable[[list[Parameter]], Optimizer]


class Replicated:
    """Every process has all weights: it is alone, or one of many (DDP)."""

    wrapped: nn.Module
    """What training calls in place of the policy."""

    can_merge = True
    """Whether an adapter can be folded into a copy of the model."""
    exchange: Exchange = staticmethod(exchange_pointers)
    """How a weight and another value of it change places."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def prepare(self, policy: Policy, make_optimizer: MakeOptimizer) -> Optimizer:
        """Puts `policy` on its device and makes the optimizer of the weights that train.

        Raises:
            ValueError: the policy's weights cannot be shared out.
        """
        self.wrapped = self.accelerator.prepare(policy)
        return self.accelerator.prepare(make_optimizer(trainable(policy)))

    def accumulating(self) -> AbstractContextManager:
        """Inside the block gradients are added up and not yet shared."""
        return self.accelerator.no_sync(self.wrapped)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Inside the block the policy and all in it can be called, by each process as often as it likes."""
        yield

    @contextmanager
    def on_main(self) -> Iterator[None]:
        """Inside the block the main process has all weights in the policy, to write and not to compute with."""
        yield

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor, on every process; called on every process."""
        return tensor

    def for_file(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor, on the main process alone; called on every process."""
        return tensor

    def part(self, full: Tensor, weight: Tensor) -> Tensor:
        """What this process keeps of `full`: a value, or optimizer state, of `weight`."""
        return full


class Sharded(Replicated):
    """Every process has a part of each weight, its gradient and its optimizer state (FSDP2).

    A block of the transformer is gathered when it runs; what is beside the blocks, heads included, when the policy
    does. Under mixed precision blocks are gathered in the lower one, and everything is stored and summed in float32.

    Raises:
        ValueError: accelerate is configured for what is not supported.
    """

    can_merge = False

    def __init__(self, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin):
        super().__init__(accelerator)
        refused = {
            "fsdp_version: 2": plugin.fsdp_version != 2,
            "fsdp_cpu_ram_efficient_loading: false": plugin.cpu_ram_efficient_loading,
            "fsdp_offload_params: false": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "fsdp_activation_checkpointing: false, and train.gradient_checkpointing: true": (
                plugin.activation_checkpointing
            ),
            "train.mixed_precision: bf16": accelerator.mixed_precision == "fp16",
        }
        wanted = [setting for setting, is_refused in refused.items() if is_refused]
        if wanted:
            raise ValueError(f"FSDP is not supported as it is configured: set {'; '.join(wanted)}")
        self.reshards = plugin.reshard_after_forward

    def prepare(self, policy: Policy, make_optimizer: MakeOptimizer) -> Optimizer:
        _check_dtypes(policy)
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        precision = MixedPrecisionPolicy()
        self.blocks = list(chain(*block_lists(policy.model)))
        if self.accelerator.mixed_precision == "bf16":
            precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            for block in self.blocks:
                block.register_forward_pre_hook(_in_bfloat16)
        for block in self.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshards, mp_policy=precision)
        self.wrapped = fully_shard(policy, mesh=mesh)
        policy.forward = self.accelerator.autocast()(policy.forward)
        self._run_once()
        return self.accelerator.prepare_optimizer(make_optimizer(trainable(policy)))

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self.wrapped.set_requires_gradient_sync(False)
        yield
        self.wrapped.set_requires_gradient_sync(True)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        # gathered once, not once for each token; and a process that is done sooner keeps nobody waiting
        for block in self.blocks:
            block.set_reshard_after_forward(False)
        for unit in self._units():
            unit.unshard()
        try:
            yield
        finally:
            self._reshard()
            for block in self.blocks:
                block.set_reshard_after_forward(self.reshards)

    @contextmanager
    def on_main(self) -> Iterator[None]:
        sharded = [(module, *named) for module in self.wrapped.modules() for named in _own_parameters(module)]
        whole: dict[Parameter, Parameter] = {}
        for _, _, weight in sharded:
            if weight not in whole:  # tied weights stay tied
                whole[weight] = Parameter(self.for_file(weight.detach()), weight.requires_grad)
        try:
            for module, name, weight in sharded:
                setattr(module, name, whole[weight])
            yield
        finally:
            for module, name, weight in sharded:
                setattr(module, name, weight)

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def for_file(self, tensor: Tensor) -> Tensor:
        full = self.full(tensor)
        return full.cpu() if self.accelerator.is_main_process else full.new_empty(0)

    def part(self, full: Tensor, weight: Tensor) -> Tensor:
        if not isinstance(weight, DTensor) or full.shape != weight.shape:
            return full
        # every process has read the same file, so nothing needs to be sent
        full = full.to(weight.device)
        return distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)

    @staticmethod
    def exchange(weight: Tensor, other: Tensor) -> None:
        # FSDP reads from memory that it knows, so values change hands and not pointers
        mine, others = weight.data.to_local(), other.data.to_local()
        kept = mine.clone()
        mine.copy_(others)
        others.copy_(kept)

    def _run_once(self) -> None:
        # whatever runs first becomes the root of all that is sharded
        with probing(self.wrapped.model) as tokens:
            nothing = torch.zeros_like(tokens, dtype=torch.bool)
            self.wrapped(tokens, ~nothing, nothing, tokens, ~nothing)
        self._reshard()

    def _units(self) -> list[FSDPModule]:
        return [module for module in self.wrapped.modules() if isinstance(module, FSDPModule)]

    def _reshard(self) -> None:
        for unit in self._units():
            unit.reshard()


def refuse_deepspeed() -> None:
    """To be called before Accelerate starts, which would look for it.

    Raises:
        NotImplementedError: the processes were launched with DeepSpeed.
    """
    if parse_flag_from_env(DEEPSPEED):
        raise NotImplementedError(
            "DeepSpeed is not supported. FSDP2 shards the same and needs no other package: launch with "
            "--config_file configs/accelerate/zero2.yaml or zero3.yaml of trlx, which say it in its words"
        )


def sharding_for(accelerator: Accelerator) -> Replicated:
    """What fits the way the processes were launched."""
    # asked for as Accelerate asks, which by itself takes no notice on CPUs
    if parse_flag_from_env(FSDP) and accelerator.num_processes > 1:
        return Sharded(accelerator, FullyShardedDataParallelPlugin())
    return Replicated(accelerator)


def trainable(policy: Policy) -> list[Parameter]:
    """The weights that train."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def _check_dtypes(policy: Policy) -> None:
    found = {weight.dtype for weight in trainable(policy)}
    if len(found) > 1:
        names = ", ".join(sorted(str(dtype) for dtype in found))
        raise ValueError(
            f"Under FSDP all weights that train must have one dtype, but there are {names}: leave dtype out of "
            "model.model_extra_configs, and set train.mixed_precision to bf16 instead"
        )


def _in_bfloat16(block: nn.Module, args: tuple) -> tuple:
    # only the hidden states: in bfloat16 a mask's most negative float32 would become minus infinity
    return args[0].bfloat16(), *args[1:]


def _own_parameters(module: nn.Module) -> list[tuple[str, Parameter]]:
    return list(module.named_parameters(recurse=False, remove_duplicate=False))
