"""Optimizers and learning-rate schedules by the names a config uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler

from trlx.config import OptimizerConfig, SchedulerConfig
from trlx.optional import optional_import

SCHEDULES = {"cosine_annealing": CosineAnnealingLR, "linear": LinearLR}
APEX_TAKES = {"lr", "betas", "eps", "weight_decay"}
"""The settings that mean the same in apex as in torch."""


def make_optimizer(config: OptimizerConfig, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    """The optimizer over the parameters that train.

    Raises:
        ValueError: nothing trains, or the optimizer does not take one of ``optimizer.kwargs``, or an 8-bit optimizer
            under FSDP.
        ImportError: an 8-bit optimizer without bitsandbytes.
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError(
            "Nothing trains: model.num_layers_unfrozen is 0 and the method has no heads; set it to -1 or more than 0"
        )
    kwargs = dict(config.kwargs)
    choose = _eight_bit if config.name.endswith("_bnb") else _fused
    cls = choose(config.name, kwargs, parameters)
    try:
        return cls(parameters, **kwargs)
    except TypeError as error:
        raise ValueError(f"optimizer.kwargs do not fit optimizer.name '{config.name}': {error}") from error


def _eight_bit(name: str, kwargs: dict[str, Any], parameters: list[Parameter]) -> type:
    if _are_sharded(parameters):
        raise ValueError(f"optimizer.name '{name}' does not work under FSDP, which shares the state out: write adamw")
    # bitsandbytes keeps small tensors and embeddings in 32 bit by itself
    optim = optional_import("bitsandbytes", extra="bnb").optim
    return {"adam_8bit_bnb": optim.Adam8bit, "adamw_8bit_bnb": optim.AdamW8bit}[name]


def _fused(name: str, kwargs: dict[str, Any], parameters: list[Parameter]) -> Callable[..., torch.optim.Optimizer]:
    """A torch optimizer, or that of apex where it can; ``fused`` in `kwargs`, true or false, asks for torch."""
    on_gpu = all(parameter.is_cuda for parameter in parameters) and not _are_sharded(parameters)
    if name != "sgd" and on_gpu and APEX_TAKES.issuperset(kwargs):
        apex = optional_import("apex.optimizers", extra="apex")
        if apex:
            return partial(apex.FusedAdam, adam_w_mode=name == "adamw")
    # one pass over memory for each parameter instead of one per arithmetic operation
    kwargs.setdefault("fused", True)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]


def _are_sharded(parameters: list[Parameter]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def make_scheduler(config: SchedulerConfig, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The schedule, stepped once per optimizer step whatever the number of processes.

    Raises:
        ValueError: the schedule does not take one of ``scheduler.kwargs``.
    """
    if config.name == "constant":
        return ConstantLR(optimizer, factor=1.0)
    try:
        return SCHEDULES[config.name](optimizer, **config.kwargs)
    except TypeError as error:
        raise ValueError(f"scheduler.kwargs do not fit scheduler.name '{config.name}': {error}") from error
