"""Where the weights are: all on every process, or sharded (FSDP2). A shard is what one process holds of a weight."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    """Every process holds all weights: a single process, or DDP."""

    wrapped: nn.Module
    """Training calls it instead of the policy."""

    independent = True
    """Whether a process can compute, and merge an adapter, without the others."""
    exchange: Exchange = staticmethod(exchange_pointers)
    """Swaps a weight and another value of it."""

    def __init__(self, accelerator: Accelerator, max_grad_norm: float):
        self.accelerator = accelerator
        self.max_grad_norm = max_grad_norm

    def prepare(self, policy: Policy, make_optimizer: MakeOptimizer) -> Optimizer:
        """Moves `policy` to the device and returns the optimizer of its trainable weights.

        Raises:
            ValueError: the policy's weights cannot be sharded.
        """
        self.wrapped, self.parameters = self.accelerator.prepare(policy), trainable(policy)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.parameters))
        return self.optimizer.optimizer

    def accumulating(self) -> AbstractContextManager:
        """Inside the block processes add up their own gradients and do not exchange them."""
        return self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`."""
        self.accelerator.backward(loss)

    def update(self) -> float:
        """Clips, applies and clears the gradients; returns their norm. If that is not finite, applies nothing."""
        norm = float(_full(self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)))
        # under fp16 the optimizer itself skips the step, and must be called to lower the loss scale
        if math.isfinite(norm) or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def unsharded(self) -> AbstractContextManager:
        """Inside the block each process can call the policy and its modules without the other processes."""
        return nullcontext()

    def sharded(self) -> AbstractContextManager:
        """Inside the block every weight of the policy is this process's shard."""
        return nullcontext()

    def writing(self, weights: Iterable[Tensor]) -> AbstractContextManager:
        """Inside the block every process may assign the same new values to `weights`."""
        return nullcontext()

    def on_main(self) -> AbstractContextManager:
        """Inside the block the main process's policy holds all weights, to save them and not to compute."""
        return nullcontext()

    def for_file(self, tensor: Tensor) -> Tensor:
        """The full tensor on the main process, anything elsewhere. Called on every process."""
        return tensor.detach()

    def shard(self, full: Tensor, weight: Tensor) -> Tensor:
        """This process's shard of `full`, a value or optimizer state of `weight`."""
        return full

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's full ``state_dict()`` on the main process. Called on every process."""
        return _with_tensors(self.optimizer.state_dict(), lambda _, value: self.for_file(value))

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restores what `optimizer_state` returned, for any number of processes."""
        shards = _with_tensors(state, lambda index, value: self.shard(value, self.parameters[index]))
        groups = zip(state["param_groups"], self.optimizer.param_groups, strict=True)
        self.optimizer.load_state_dict({**shards, "param_groups": [with_own_settings(*pair) for pair in groups]})


class Sharded(Replicated):
    """Every process holds a shard of each weight, its gradient and its optimizer state (FSDP2).

    FSDP gathers a block of the transformer when the block runs, and all other weights, heads included, when the policy
    runs. With bf16, blocks are gathered in bfloat16; weights are stored and gradients summed in float32.

    Raises:
        ValueError: accelerate's configuration is not supported.
    """

    independent = False

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
        refuse("FSDP", refused)
        self.reshards = plugin.reshard_after_forward

    def prepare(self, policy: Policy, make_optimizer: MakeOptimizer) -> Optimizer:
        _check_dtypes(policy)
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        precision = MixedPrecisionPolicy()
        self.blocks = list(chain(*block_lists(policy.model)))
        if self.accelerator.mixed_precision == "bf16":
            precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            for block in self.blocks:
                block.register_forward_pre_hook(in_bfloat16)
        for block in self.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshards, mp_policy=precision)
        self.wrapped = fully_shard(policy, mesh=mesh)
        # torch warns of in-place operations on these outputs; there are none
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP\w*Policy\) returned a view", UserWarning)
        policy.forward = self.accelerator.autocast()(policy.forward)
        self._run_once()
        self.parameters = trainable(policy)
        self.optimizer = self.accelerator.prepare_optimizer(make_optimizer(self.parameters))
        return self.optimizer.optimizer

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        # gradients that wait are whole, and take more than weights, moments and reference in parts: where blocks are
        # given up after each pass, each microbatch's gradients are exchanged and divided at once
        self.wrapped.set_requires_gradient_sync(bool(self.reshards))
        try:
            yield
        finally:
            self.wrapped.set_requires_gradient_sync(True)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        # gather once, not for each token; and a process may sample fewer tokens than the others
        for block in self.blocks:
            block.set_reshard_after_forward(False)
        for module in self._fsdp_modules():
            module.unshard()
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

    def for_file(self, tensor: Tensor) -> Tensor:
        full = _full(tensor.detach())
        return full.cpu() if self.accelerator.is_main_process else full.new_empty(0)

    def shard(self, full: Tensor, weight: Tensor) -> Tensor:
        if not isinstance(weight, DTensor) or full.shape != weight.shape:
            return full
        # every process has read the same file, so nothing needs to be sent
        full = full.to(weight.device)
        return distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)

    @staticmethod
    def exchange(weight: Tensor, other: Tensor) -> None:
        # FSDP keeps pointers into this memory, so swap values and not pointers
        mine, others = weight.data.to_local(), other.data.to_local()
        kept = mine.clone()
        mine.copy_(others)
        others.copy_(kept)

    def _run_once(self) -> None:
        # the first module that runs becomes FSDP's root
        with probing(self.wrapped.model) as tokens:
            nothing = torch.zeros_like(tokens, dtype=torch.bool)
            self.wrapped(tokens, ~nothing, nothing, tokens, ~nothing)
        self._reshard()

    def _reshard(self) -> None:
        for module in self._fsdp_modules():
            module.reshard()

    def _fsdp_modules(self) -> list[FSDPModule]:
        return [module for module in self.wrapped.modules() if isinstance(module, FSDPModule)]


def refuse(launcher: str, settings: dict[str, bool]) -> None:
    """Raises ValueError if a value of `settings` is True; their names say what to set instead."""
    wanted = [setting for setting, is_refused in settings.items() if is_refused]
    if wanted:
        raise ValueError(f"{launcher} is not supported as it is configured: set {'; '.join(wanted)}")


def trainable(policy: Policy) -> list[Parameter]:
    """The weights that train."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


@contextmanager
def whole_on_main(policy: nn.Module, for_file: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block the policy's weights are replaced by what `for_file` makes of them."""
    places = [
        (module, name, weight)
        for module in policy.modules()
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    # one copy of each, so that tied weights stay tied
    whole = {weight: Parameter(for_file(weight), weight.requires_grad) for weight in policy.parameters()}
    try:
        for module, name, weight in places:
            setattr(module, name, whole[weight])
        yield
    finally:
        for module, name, weight in places:
            setattr(module, name, weight)


def _with_tensors(state: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """An optimizer's ``state_dict()``, each tensor replaced by ``change(index of its parameter, tensor)``."""
    changed = {
        index: {name: change(index, value) if isinstance(value, Tensor) else value for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": changed}


def with_own_settings(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A saved parameter group with this optimizer's settings. Entries that only the saved one has stay: apex counts
    its steps there."""
    return {**saved, **{name: value for name, value in own.items() if name != "params"}}


def _check_dtypes(policy: Policy) -> None:
    found = {weight.dtype for weight in trainable(policy)}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise ValueError(
            f"Under FSDP all weights that train must have one dtype, but there are {names}: leave dtype out of "
            "model.model_extra_configs, and set train.mixed_precision to bf16 instead"
        )


def _full(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is sharded. Called on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def in_bfloat16(block: nn.Module, args: tuple) -> tuple:
    """A hook before a block whose weights are gathered in bfloat16."""
    # only the hidden states: in bfloat16 a mask's smallest float32 would become minus infinity
    return args[0].bfloat16(), *args[1:]
