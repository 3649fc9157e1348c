"""Megatron-Core's optimizer for a stage's weights, with its learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn

from trlx.backends.megatron.cpu import cuda_type_names
from trlx.backends.megatron.parallel import ParallelState
from trlx.backends.megatron.settings import MegatronSettings, Optim

MAIN = "main"
"""The `kind` of `Updates.optimizer_state` for the float32 main weight."""


class Updates:
    """Clips and applies gradients. Skips a step whose gradients are not finite.

    Args:
        stage: this process's model chunks, wrapped for data parallelism.
    """

    def __init__(self, stage: list[nn.Module], settings: MegatronSettings, parallel: ParallelState):
        self.parallel = parallel
        self.optim: Optim = settings.optim
        self.max_norm = settings.max_grad_norm
        self.step_count = 0
        self.averaged_steps = 0
        """Steps since the optimizer state started: less than `step_count` after a resume without optimizer state."""
        self.engine = _megatron_optimizer(stage, settings)
        if settings.dtype == torch.float16:
            for chunk in stage:
                chunk.config.grad_scale_func = self.engine.scale_loss
        self._scaler = getattr(self.engine, "grad_scaler", None)
        self._shards = _shards_of(self.engine) if settings.optim.distributed else {}
        self._set_rate()

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.optim.schedule.rate(self.step_count, self.optim.lr)

    @torch.no_grad()
    def apply(self, leave_out: bool = False) -> dict[str, float]:
        """One optimizer step, or none with `leave_out`. Returns metrics that are equal on all ranks."""
        if leave_out:
            return {"skipped_steps": 1.0, "learning_rate_group_0": self.rate}
        overflow = self.engine.prepare_grads()
        norm = float("inf") if overflow else self._clipped_norm()
        rate, skipped = self.rate, not math.isfinite(norm)
        if not skipped:
            self.engine.step_with_ready_grads()
            self.step_count += 1
            self.averaged_steps += 1
            self._set_rate()
        return {"grad_norm": norm, "skipped_steps": float(skipped), "learning_rate_group_0": rate}

    def clear(self) -> None:
        """Clears the gradients."""
        self.engine.zero_grad()

    def state_names(self, weight: Tensor) -> list[str]:
        """The names of the optimizer state of `weight`; none before the first step."""
        return list(self.optim.moment_names) if self.averaged_steps else []

    def main_weight(self, weight: Tensor) -> Tensor:
        """The float32 main weight of `weight`. Call it on all data ranks, as `optimizer_state`."""
        is_half = weight.requires_grad and weight.dtype != torch.float32
        return self.optimizer_state(weight, MAIN) if is_half else weight

    def set_main_weight(self, weight: Tensor, value: Tensor) -> None:
        """Sets `weight` and its float32 main weight."""
        weight.copy_(value)
        if weight.requires_grad and weight.dtype != torch.float32:
            self.set_optimizer_state(weight, MAIN, value)

    def optimizer_state(self, weight: Tensor, kind: str) -> Tensor:
        """Optimizer state of `weight`, in its shape. The distributed optimizer gathers it from the data ranks' shards,
        so call this on all of them."""
        shard, where = self._shard(weight, kind)
        if where is None:
            return shard
        whole = torch.zeros(weight.numel(), device=weight.device)
        if shard is not None:
            whole[where] = shard.flatten()
        return self.parallel.sum_over_data(whole).to(weight.device).view_as(weight)

    def set_optimizer_state(self, weight: Tensor, kind: str, value: Tensor) -> None:
        """Sets the optimizer state that `optimizer_state` returns."""
        shard, where = self._shard(weight, kind)
        if shard is not None:
            shard.copy_(value if where is None else value.flatten()[where].view_as(shard))

    def init_state(self) -> None:
        """Makes zero optimizer state for every weight, which `set_optimizer_state` then sets from a checkpoint."""
        optimizer = self.engine.optimizer
        if optimizer is None or not self.averaged_steps:
            return
        for group in optimizer.param_groups:
            for weight in group["params"]:
                averages = {name: torch.zeros_like(weight) for name in self.optim.moment_names}
                optimizer.state[weight] = averages | {"step": torch.tensor(float(self.averaged_steps))}

    def _shard(self, weight: Tensor, kind: str) -> tuple[Tensor | None, slice | None]:
        """(this process's shard, its slice of the flattened weight). The slice is None where the shard is all of it."""
        if not self.optim.distributed:
            main = weight if weight.dtype == torch.float32 else weight.main_param
            return (main if kind == MAIN else self.engine.optimizer.state[main][kind]), None
        main = self._shards.get(weight)
        if main is None:
            return None, slice(0)
        part = self.engine._get_model_param_range_map(weight)["param"]
        shard = main if kind == MAIN else self.engine.optimizer.state[main][kind]
        return shard, slice(part.start, part.end)

    def state(self) -> dict[str, Any]:
        """Step counts and loss scale, for a checkpoint."""
        scaler = None if self._scaler is None else self._scaler.state_dict()
        if scaler is not None:
            scaler["scale"] = float(scaler["scale"])
        return {"step_count": self.step_count, "averaged_steps": self.averaged_steps, "scaler": scaler}

    def load(self, state: dict[str, Any], averages: bool) -> None:
        """Restores `state`; without `averages` the optimizer state starts at zero."""
        self.step_count = state["step_count"]
        self.averaged_steps = state["averaged_steps"] if averages else 0
        if self.engine.optimizer is not None and not averages:
            self.engine.optimizer.state.clear()
        self._set_rate()
        # a resume in another precision may have no loss scale, before or now
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict({**state["scaler"], "scale": torch.tensor([state["scaler"]["scale"]])})

    def _clipped_norm(self) -> float:
        if self.max_norm is None:
            return float(self.engine.get_grad_norm())
        return float(self.engine.clip_grad_norm(self.max_norm))

    def _set_rate(self) -> None:
        for group in self.engine.param_groups:
            group["lr"] = self.rate


def _megatron_optimizer(stage: list[nn.Module], settings: MegatronSettings) -> MegatronOptimizer:
    optim = settings.optim
    config = OptimizerConfig(
        optimizer=optim.name,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        decoupled_weight_decay=optim.decoupled_weight_decay,
        sgd_momentum=optim.momentum,
        use_distributed_optimizer=optim.distributed,
        bf16=settings.dtype == torch.bfloat16,
        fp16=settings.dtype == torch.float16,
        params_dtype=settings.dtype,
        clip_grad=settings.max_grad_norm or 0.0,
    )
    with cuda_type_names():
        # config_overrides={}: weight decay on every weight, as in torch
        optimizer = get_megatron_optimizer(config, stage, config_overrides={}, use_gloo_process_groups=False)
    return optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer


def _shards_of(engine: MegatronOptimizer) -> dict[Tensor, Tensor]:
    """Weight -> this data rank's float32 shard of it, for the weights that it updates."""
    whole = (*engine.model_float16_groups, *engine.model_fp32_groups)
    shards = (*engine.shard_fp32_from_float16_groups, *engine.shard_fp32_groups)
    return {
        weight: shard
        for weights, sharded in zip(whole, shards, strict=True)
        for weight, shard in zip(weights, sharded, strict=True)
    }
