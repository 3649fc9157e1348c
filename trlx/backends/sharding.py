"""Where weights are: on every process all of them, or a part of each (FSDP2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from trlx.models.decoder import block_lists, probing
from trlx.models.policy import Policy
from trlx.models.reference import Exchange, exchange_pointers

MakeOptimizer = Callable[[list[Parameter]], Optimizer]


class Replicated:
    """Every process has all weights: it is alone, or one of many (DDP)."""

    wrapped: nn.Module
    """What training calls in place of the policy."""

    can_merge = True
    """Whether an adapter can be folded into a copy of the model."""
    exchange: Exchange = staticmethod(exchange_pointers)
    """How a weight and another value of it change places."""

    def __init__(self, accelerator: Accelerator, max_grad_norm: float):
        self.accelerator = accelerator
        self.max_grad_norm = max_grad_norm

    def prepare(self, policy: Policy, make_optimizer: MakeOptimizer) -> Optimizer:
        """Puts `policy` on its device, and makes and returns the optimizer of the weights that train.

        Raises:
            ValueError: the policy's weights cannot be shared out.
        """
        self.wrapped, self.parameters = self.accelerator.prepare(policy), trainable(policy)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.parameters))
        return self.optimizer.optimizer

    def accumulating(self) -> AbstractContextManager:
        """Inside the block gradients are added up and not yet shared."""
        return self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`."""
        self.accelerator.backward(loss)

    def update(self) -> float:
        """Clips, applies and clears the gradients and gives their norm; where that is not finite nothing is applied."""
        norm = float(self.full(self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)))
        # under fp16 the optimizer skips by itself and must be called for the loss scale to come down
        if math.isfinite(norm) or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Inside the block the policy and all in it can be called, by each process as often as it likes."""
        yield

    @contextmanager
    def parts(self) -> Iterator[None]:
        """Inside the block every weight of the policy is the part of it that this process keeps."""
        yield

    @contextmanager
    def writing(self, weights: Iterable[Tensor]) -> Iterator[None]:
        """Inside the block `weights` may be given other values, the same by every process."""
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
        return tensor.detach()

    def part(self, full: Tensor, weight: Tensor) -> Tensor:
        """What this process keeps of `full`: a value, or optimizer state, of `weight`."""
        return full

    def optimizer_state(self) -> dict[str, Any]:
        """The whole state of the optimizer, on the main process alone; called on every process."""
        return _with_tensors(self.optimizer.state_dict(), lambda _, value: self.for_file(value))

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restores what `optimizer_state` gave, of one or of many processes."""
        parts = _with_tensors(state, lambda index, value: self.part(value, self.parameters[index]))
        groups = zip(state["param_groups"], self.optimizer.param_groups, strict=True)
        self.optimizer.load_state_dict({**parts, "param_groups": [with_own_settings(*pair) for pair in groups]})


class Sharded(Replicated):
    """Every process has a part of each weight, its gradient and its optimizer state (FSDP2).

    A block of the transformer is gathered when it runs; what is beside the blocks, heads included, when the policy
    does. Under mixed precision blocks are gathered in the lower one, and everything is stored and summed in float32.

    Raises:
        ValueError: accelerate is configured for what is not supported.
    """

    can_merge = False

    def __init__(self, accelerator: Accelerator, max_grad_norm: float, plugin: FullyShardedDataParallelPlugin):
        super().__init__(accelerator, max_grad_norm)
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
        # torch warns of what in-place operations on these scores would do; there are none
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP\w*Policy\) returned a view", UserWarning)
        policy.forward = self.accelerator.autocast()(policy.forward)
        self._run_once()
        self.parameters = trainable(policy)
        self.optimizer = self.accelerator.prepare_optimizer(make_optimizer(self.parameters))
        return self.optimizer.optimizer

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
        with whole_on_main(self.wrapped, self.for_file):
            yield

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def for_file(self, tensor: Tensor) -> Tensor:
        full = self.full(tensor.detach())
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


def trainable(policy: Policy) -> list[Parameter]:
    """The weights that train."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


@contextmanager
def whole_on_main(policy: nn.Module, for_file: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block copies that `for_file` makes stand in the place of the policy's weights."""
    sharded = [(module, *named) for module in policy.modules() for named in _own_parameters(module)]
    whole: dict[Parameter, Parameter] = {}
    for _, _, weight in sharded:
        if weight not in whole:  # tied weights stay tied
            whole[weight] = Parameter(for_file(weight), weight.requires_grad)
    try:
        for module, name, weight in sharded:
            setattr(module, name, whole[weight])
        yield
    finally:
        for module, name, weight in sharded:
            setattr(module, name, weight)


def _with_tensors(state: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """An optimizer's state, each tensor of it changed by a function of its parameter's index and itself."""
    changed = {
        index: {name: change(index, value) if isinstance(value, Tensor) else value for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": changed}


def with_own_settings(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A saved group of parameters with the settings of this optimizer, and what only the saved one has: apex counts its
    steps there."""
    return {**saved, **{name: value for name, value in own.items() if name != "params"}}


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
