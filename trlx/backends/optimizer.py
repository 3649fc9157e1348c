"""Optimizers and learning-rate schedules by the names a config uses."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler

from trlx import logging
from trlx.config import OptimizerConfig, SchedulerConfig
from trlx.optional import is_available, require
from trlx.strict import ConfigError, check_keywords, unknown_key

logger = logging.get_logger(__name__)

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
LR_SCHEDULES = {"cosine_annealing": CosineAnnealingLR, "linear": LinearLR}
LR_SCHEDULE_SETTINGS = {"constant": []} | {
    name: [key for key in inspect.signature(cls).parameters if key != "optimizer"] for name, cls in LR_SCHEDULES.items()
}
APEX_TAKES = {"lr", "betas", "eps", "weight_decay"}
"""Settings with the same meaning in apex and torch."""


def check_settings(optimizer: OptimizerConfig, scheduler: SchedulerConfig) -> None:
    """Checks, before a model is loaded, that optimizer and LR schedule take their ``kwargs``.

    Raises:
        ConfigError: one of them does not know a name; the message has the nearest known name.
    """
    if optimizer.name in OPTIMIZERS:  # bitsandbytes is not loaded yet, and checks its own
        check_keywords(OPTIMIZERS[optimizer.name], _written(optimizer.kwargs), "optimizer.kwargs", ours=("params",))
    known = LR_SCHEDULE_SETTINGS[scheduler.name]
    unknown = [name for name in _written(scheduler.kwargs) if name not in known]
    for name in unknown:
        if not any(name in names for names in LR_SCHEDULE_SETTINGS.values()):
            raise unknown_key("scheduler.kwargs", name, known)
    if unknown and known:
        raise ConfigError(
            f"scheduler.name '{scheduler.name}' does not take {' and '.join(unknown)}, as another schedule does: "
            f"write scheduler.kwargs.{unknown[0]}: null to leave it out. Known: {', '.join(known)}"
        )
    if unknown:
        logger.warning(f"scheduler.name '{scheduler.name}' has no use for scheduler.kwargs {' and '.join(unknown)}")


def make_optimizer(config: OptimizerConfig, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the parameters that train.

    Raises:
        ValueError: nothing trains, the optimizer does not take ``optimizer.kwargs``, or it is 8-bit under FSDP.
        ImportError: an 8-bit optimizer needs bitsandbytes.
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError(
            "Nothing trains: model.num_layers_unfrozen is 0 and the method has no heads; set it to -1 or more than 0"
        )
    kwargs = _written(config.kwargs)
    choose = _eight_bit if config.name.endswith("_bnb") else _fused
    try:
        return choose(config.name, kwargs, parameters)(parameters, **kwargs)
    except TypeError as error:
        raise ValueError(f"optimizer.kwargs do not fit optimizer.name '{config.name}': {error}") from error


def _eight_bit(name: str, kwargs: dict[str, Any], parameters: list[Parameter]) -> type:
    if _are_sharded(parameters):
        raise ValueError(f"optimizer.name '{name}' does not work under FSDP, which shards its state: write adamw")
    # bitsandbytes itself keeps the state of small tensors and embeddings in 32 bits
    require("bitsandbytes", extra="bnb", purpose=f"The optimizer {name}")
    from bitsandbytes import optim

    return {"adam_8bit_bnb": optim.Adam8bit, "adamw_8bit_bnb": optim.AdamW8bit}[name]


def _fused(name: str, kwargs: dict[str, Any], parameters: list[Parameter]) -> Callable[..., torch.optim.Optimizer]:
    """Apex's optimizer if it is installed and takes `kwargs`, or torch's. ``fused`` in `kwargs` asks for torch's."""
    on_gpu = all(parameter.is_cuda for parameter in parameters) and not _are_sharded(parameters)
    if name != "sgd" and on_gpu and APEX_TAKES.issuperset(kwargs) and is_available("apex.optimizers"):
        from apex.optimizers import FusedAdam

        return partial(FusedAdam, adam_w_mode=name == "adamw")
    # one pass over a parameter's memory instead of one per arithmetic operation
    kwargs.setdefault("fused", True)
    return OPTIMIZERS[name]


def _written(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` without nulls: with null a config removes a setting of its preset."""
    return {name: value for name, value in kwargs.items() if value is not None}


def _are_sharded(parameters: list[Parameter]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def move_state(optimizer: torch.optim.Optimizer, device: torch.device | str) -> None:
    """Moves the running averages of `optimizer` to `device`; on the host they are pinned, so that copies are fast."""
    device = torch.device(device)
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.device.type != device.type:
                state[name] = _copied(value, device)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return tensor.to(device, non_blocking=True)
    return torch.empty_like(tensor, device=device, pin_memory=True).copy_(tensor)


def make_scheduler(config: SchedulerConfig, optimizer: torch.optim.Optimizer, steps: int = 0) -> LRScheduler:
    """The LR schedule after `steps` optimizer steps. It counts optimizer steps, for any number of processes.

    Raises:
        ValueError: the schedule does not take ``scheduler.kwargs``.
    """
    for group in optimizer.param_groups:  # an earlier schedule may have changed it
        group["lr"] = group.pop("initial_lr", group["lr"])
    kind, kwargs = LR_SCHEDULES.get(config.name), _written(config.kwargs)
    try:
        scheduler = kind(optimizer, **kwargs) if kind else ConstantLR(optimizer, factor=1.0)
    except TypeError as error:
        raise ValueError(f"scheduler.kwargs do not fit scheduler.name '{config.name}': {error}") from error
    with warnings.catch_warnings():
        # torch warns that the optimizer has not stepped; the interrupted run did
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            scheduler.step()
    return scheduler
