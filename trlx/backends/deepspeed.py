"""DeepSpeed's ZeRO-2 and ZeRO-3 (arXiv:1910.02054): sharded optimizer state and gradients; in ZeRO-3 also weights."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DeepSpeedPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from trlx.backends.sharding import MakeOptimizer, Replicated, refuse, trainable, whole_on_main, with_own_settings
from trlx.batch import TokenOutputs
from trlx.models.policy import Policy
from trlx.optional import require

ASKED = "ACCELERATE_USE_DEEPSPEED"
"""``accelerate launch`` sets this variable to launch processes for DeepSpeed."""
ELEMENTWISE = ("torch.optim.", "apex.optimizers.")
"""Modules whose optimizers update each number of a weight by itself, so they can update a shard."""
SHARED = "step"
"""The entry of an optimizer's state that is the same for all weights."""


def wants_deepspeed() -> bool:
    """Whether the processes were launched for DeepSpeed.

    Raises:
        ImportError: DeepSpeed is not installed, but they were.
    """
    wanted = parse_flag_from_env(ASKED)
    if wanted:
        require("deepspeed", extra="deepspeed", purpose="Training with DeepSpeed")
    return wanted


def zero_for(accelerator: Accelerator, max_grad_norm: float) -> Zero2:
    """The stage of ZeRO in accelerate's configuration.

    Raises:
        ValueError: the configuration is not supported.
    """
    plugin = DeepSpeedPlugin()
    refused = {
        "zero_stage: 2 or 3": plugin.zero_stage not in STAGES,
        "offload_optimizer_device: none": plugin.offload_optimizer_device != "none",
        "offload_param_device: none": plugin.offload_param_device != "none",
        "no deepspeed_config_file": os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none",
        "train.minibatch_size instead of gradient_accumulation_steps": (
            plugin.gradient_accumulation_steps not in ("auto", 1)
        ),
        "train.max_grad_norm instead of gradient_clipping": plugin.gradient_clipping != "auto",
        "train.mixed_precision: bf16": accelerator.mixed_precision == "fp16",
    }
    refuse("DeepSpeed", refused)
    return STAGES[plugin.zero_stage](accelerator, max_grad_norm)


class Zero2(Replicated):
    """Every process holds all weights, and shards of the gradients and the optimizer state (ZeRO-2).

    DeepSpeed's engine clips and applies gradients, and skips a step whose gradients are not finite. With bf16,
    torch.autocast rounds as under DDP; the engine itself runs in float32.
    """

    stage = 2
    independent = False

    def prepare(self, policy: Policy, make_optimizer: MakeOptimizer) -> Optimizer:
        _check_dtypes(policy)
        self.policy, self.parameters = policy.to(self.accelerator.device), trainable(policy)
        # autocast caches the weights it rounds; under ZeRO-3 that would keep all of them gathered
        autocast = self.accelerator.autocast(AutocastKwargs(cache_enabled=self.stage == 2))
        policy.forward = autocast(policy.forward)
        optimizer = make_optimizer(self.parameters)
        if not type(optimizer).__module__.startswith(ELEMENTWISE):
            raise ValueError("Under DeepSpeed optimizer.name must be adam, adamw or sgd")
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=_Tuples(policy), optimizer=optimizer, config=self._config()
        )
        self.wrapped = _Outputs(self.engine)
        return optimizer

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def update(self) -> float:
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def writing(self, weights: Iterable[Tensor]) -> Iterator[None]:
        from deepspeed.utils import safe_set_full_fp32_param

        weights = list(weights)
        yield
        for weight in weights:
            if weight.requires_grad:  # the optimizer has a float32 copy of it
                safe_set_full_fp32_param(weight, weight.detach())

    @contextmanager
    def on_main(self) -> Iterator[None]:
        # saving an adapter also runs it, on this process alone
        with self.unsharded(), whole_on_main(self.policy, self._copy_on_main):
            yield

    def _copy_on_main(self, tensor: Tensor) -> Tensor:
        # a copy, because a weight is a slice of one long vector of all of them
        return tensor.detach().cpu().clone() if self.accelerator.is_main_process else tensor.new_empty(0)

    for_file = _copy_on_main

    def optimizer_state(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.optimizer.optimizer
        kept = inner.state.get(self._flat()[0], {})
        state = {}
        for index, weight in enumerate(self.parameters):
            # a collective per name, so in the dict's order, which is the same on every process
            full = {n: v if n == SHARED else safe_get_full_optimizer_state(weight, n) for n, v in kept.items()}
            state[index] = {name: self._copy_on_main(value) for name, value in full.items()}
        indices = list(range(len(self.parameters)))
        return {"state": state, "param_groups": [{**group, "params": indices} for group in inner.param_groups]}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        (group,), (saved,) = self.optimizer.optimizer.param_groups, state["param_groups"]
        group.update({**with_own_settings(saved, group), "params": group["params"]})
        for entries in list(state["state"].values())[:1]:
            self._make_room(entries, on_device=bool(group.get("fused")))
        for index, entries in state["state"].items():
            for name in entries.keys() - {SHARED}:
                self._set_state(self.parameters[index], name, entries[name])

    def _make_room(self, entries: dict[str, Any], on_device: bool) -> None:
        """Gives the new optimizer an empty state with the names of `entries`."""
        for flat in self._flat():
            room = {name: torch.zeros_like(flat) for name in entries.keys() - {SHARED}}
            if SHARED in entries:
                room[SHARED] = entries[SHARED].to(flat.device if on_device else "cpu", copy=True)
            self.optimizer.optimizer.state[flat] = room

    def _set_state(self, weight: Parameter, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self.optimizer._lazy_init_hp_params_optimizer_state()
        safe_set_full_optimizer_state(weight, value, name)

    def _flat(self) -> list[Tensor]:
        """What the optimizer updates: this process's shards of the weights, concatenated."""
        return self.optimizer.single_partition_of_fp32_groups

    def _config(self) -> dict[str, Any]:
        return {
            # required, but without effect: trlx divides losses and decides when to step
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0 if math.isinf(self.max_grad_norm) else self.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": self.stage},
            "steps_per_print": 1 << 60,
        }


class Zero3(Zero2):
    """As ZeRO-2, but every process holds a shard of each weight, and a module's weights are gathered when it runs."""

    stage = 3

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(self.engine):
            yield

    @contextmanager
    def writing(self, weights: Iterable[Tensor]) -> Iterator[None]:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_local_fp32_param

        weights = list(weights)
        with GatheredParameters(weights, modifier_rank=0):
            yield
        for weight in weights:
            if weight.requires_grad:  # the optimizer has a float32 copy of it
                safe_set_local_fp32_param(weight, weight.ds_tensor)

    @contextmanager
    def sharded(self) -> Iterator[None]:
        weights = [(weight, weight.data) for weight in self.policy.parameters()]
        for weight, _ in weights:
            weight.data = weight.ds_tensor.data
        yield
        for weight, placeholder in weights:
            weight.data = placeholder

    def for_file(self, tensor: Tensor) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):  # does nothing to a tensor that is not sharded
            return self._copy_on_main(tensor)

    @staticmethod
    def exchange(weight: Tensor, other: Tensor) -> None:
        # DeepSpeed keeps pointers into this memory, so swap values and not pointers
        shard = weight.ds_tensor.data
        kept = shard.clone()
        shard.copy_(other)
        other.copy_(kept)

    def _set_state(self, weight: Parameter, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        size, rank = weight.ds_tensor.numel(), self.accelerator.process_index
        mine = value.flatten()[size * rank : size * (rank + 1)]
        shard = torch.zeros_like(weight.ds_tensor)
        shard[: len(mine)] = mine
        safe_set_local_optimizer_state(weight, shard, name)

    def _flat(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def _config(self) -> dict[str, Any]:
        # shard small weights too: `exchange` needs every weight sharded between two steps
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        return {**super()._config(), "zero_optimization": zero}


STAGES = {2: Zero2, 3: Zero3}


class _Tuples(nn.Module):
    """The policy with its outputs as a tuple, because DeepSpeed finds tensors only there."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy

    def forward(self, *columns: Tensor | None) -> tuple[Tensor | None, ...]:
        # forward(), because DeepSpeed's hooks on a call would look at the TokenOutputs
        outputs = self.policy.forward(*columns)
        return tuple(getattr(outputs, field.name) for field in fields(outputs))


class _Outputs:
    """An engine around `_Tuples` that is called like the policy."""

    def __init__(self, engine: nn.Module):
        self.engine = engine
        self.train = engine.train

    def __call__(self, *columns: Tensor | None) -> TokenOutputs:
        return TokenOutputs(*self.engine(*columns))


def _check_dtypes(policy: Policy) -> None:
    others = {weight.dtype for weight in policy.parameters()} - {torch.float32}
    if others:
        names = ", ".join(sorted(map(str, others)))
        raise ValueError(
            f"Under DeepSpeed all weights must be float32, but there are {names}: leave dtype and quantization out of "
            "model.model_extra_configs, and set train.mixed_precision to bf16 instead"
        )
