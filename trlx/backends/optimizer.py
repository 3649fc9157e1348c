"""Optimizers and learning-rate schedules by the names a config uses."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler

from trlx import logging
from trlx.config import OptimizerConfig, SchedulerConfig
from trlx.optional import optional_import
from trlx.strict import ConfigError, check_keywords, unknown_key

logger = logging.get_logger(__name__)

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
SCHEDULES = {"cosine_annealing": CosineAnnealingLR, "linear": LinearLR}
SCHEDULE_SETTINGS = {
    "constant": [],
    **{
        name: [key for key in inspect.signature(cls).parameters if key != "optimizer"]
        for name, cls in SCHEDULES.items()
    },
}
APEX_TAKES = {"lr", "betas", "eps", "weight_decay"}
"""The settings that mean the same in apex as in torch."""


def check_settings(optimizer: OptimizerConfig, scheduler: SchedulerConfig) -> None:
    """Makes sure, before a model is loaded, that optimizer and schedule take what ``kwargs`` give them.

    Raises:
        ConfigError: one of them does not know a name; the message says the nearest it knows.
    """
    if optimizer.name in OPTIMIZERS:  # what bitsandbytes takes shows when it is loaded
        check_keywords(OPTIMIZERS[optimizer.name], _written(optimizer.kwargs), "optimizer.kwargs", ours=("params",))
    known = SCHEDULE_SETTINGS[scheduler.name]
    unknown = [name for name in _written(scheduler.kwargs) if name not in known]
    for name in unknown:
        if not any(name in names for names in SCHEDULE_SETTINGS.values()):
            raise unknown_key("scheduler.kwargs", name, known)
    if unknown and known:
        raise ConfigError(
            f"scheduler.name '{scheduler.name}' does not take {' and '.join(unknown)}, as another schedule does: "
            f"write scheduler.kwargs.{unknown[0]}: null to leave it out. Known: {', '.join(known)}"
        )
    if unknown:
        logger.warning(f"scheduler.name '{scheduler.name}' has no use for scheduler.kwargs {' and '.join(unknown)}")


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
    kwargs = _written(config.kwargs)
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
    return OPTIMIZERS[name]


def _written(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` without nulls, by which a config leaves out what its preset says."""
    return {name: value for name, value in kwargs.items() if value is not None}


def _are_sharded(parameters: list[Parameter]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def make_scheduler(config: SchedulerConfig, optimizer: torch.optim.Optimizer, steps: int = 0) -> LRScheduler:
    """The schedule, stepped once per optimizer step whatever the number of processes, as it is after `steps` of them.

    Raises:
        ValueError: the schedule does not take one of ``scheduler.kwargs``.
    """
    for group in optimizer.param_groups:  # an earlier schedule may have moved it
        group["lr"] = group.pop("initial_lr", group["lr"])
    kind, kwargs = SCHEDULES.get(config.name), _written(config.kwargs)
    try:
        scheduler = kind(optimizer, **kwargs) if kind else ConstantLR(optimizer, factor=1.0)
    except TypeError as error:
        raise ValueError(f"scheduler.kwargs do not fit scheduler.name '{config.name}': {error}") from error
    with warnings.catch_warnings():
        # torch misses the steps of the optimizer, which were made by the run that goes on
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            scheduler.step()
    return scheduler
