"""Checks of what a trainer class, its loss and its advantages give, so that an own method fails with a sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trlx.backends.base import ModelNeeds
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.compat.hooks import check_hooks
from trlx.methods.masked import Metrics, Spread
from trlx.methods.units import Unit


def check_class(trainer: Any) -> None:
    """Checks the members of a trainer that its class defines, before the model is loaded.

    Raises:
        TypeError: one of them is missing or of another type, or is a hook of CarperAI's trlx that nothing calls.
        ValueError: the method section of the config is of another class.
    """
    cls, method = type(trainer), trainer.method
    name = cls.__name__
    check_hooks("trainer", cls)
    check_hooks("method", type(method))
    if not isinstance(method, cls.method_class):
        raise ValueError(f"{name} needs method.name {cls.method_class.__name__}, got {method.name}")
    if not hasattr(cls, "backend_class") and "backend_class" not in vars(trainer):
        raise TypeError(f"{name} has no backend: write backend_class = AccelerateBackend in it")
    if not hasattr(method, "gen_kwargs"):
        raise TypeError(f"{type(method).__name__} has no gen_kwargs, the generation settings of evaluations")
    if (cls.state_dict, cls.load_state_dict) != _same_class(cls, "state_dict", "load_state_dict"):
        raise TypeError(f"{name} overrides only one of state_dict and load_state_dict: a resume needs both")
    needs = cls.needs(method)
    if not isinstance(needs, ModelNeeds):
        raise TypeError(f"{name}.needs must return a ModelNeeds, got {needs!r}")
    if not isinstance(trainer.unit, Unit):
        raise TypeError(f"{name}.unit must be Unit.TOKEN, Unit.SEQUENCE or Unit.PAIR, got {trainer.unit!r}")
    for member in ("passes_per_epoch", "rows_together", *(("samples_per_prompt",) if trainer.online else ())):
        number = getattr(trainer, member)
        if type(number) is not int or number < 1:
            raise TypeError(f"{name}.{member} must be a whole number of at least 1, got {number!r}")


def check_rollouts_given(name: str, rollouts: Any, together: int) -> None:
    """Checks what ``learn_from`` of the trainer called `name` gets.

    Raises:
        TypeError, ValueError: it is no list of rollouts, or no whole blocks of `together` rows.
    """
    if not isinstance(rollouts, list) or not all(isinstance(rollout, Rollout) for rollout in rollouts):
        raise TypeError(f"{name}.learn_from takes a list of trlx.batch.Rollout, got {repr(rollouts)[:80]}")
    if not rollouts or len(rollouts) % together:
        raise ValueError(f"{name}.learn_from got {len(rollouts)} rollouts: give a multiple of {together}")


def check_collection(name: str, before: TokenBatch, after: Any) -> TokenBatch:
    """What ``advantages`` of the trainer called `name` made of a collection.

    Raises:
        TypeError, ValueError: it is no batch of the same rows, or a column has another shape or is not finite.
    """
    if not isinstance(after, TokenBatch):
        raise TypeError(f"{name}.advantages must return a TokenBatch, got {type(after).__name__}")
    rows, width = before.tokens.shape
    for column, tensor in after.columns().items():
        shape = list(tensor.shape)
        wanted = [rows] if column == "group" else [rows, width]
        if shape != wanted and not column.startswith("encoder_"):
            raise ValueError(f"{name}.advantages gave {column} the shape {shape}: it must be {wanted}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name}.advantages gave {column} numbers that are not finite")
    return after


def checked_loss(name: str, loss: Any, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
    """``loss(outputs, batch)`` of the trainer called `name`, for its first step.

    Raises:
        TypeError, ValueError: it does not return a summed loss and metrics.
    """
    try:
        returned = loss(outputs, batch)
    except TypeError as error:
        if "NoneType" not in str(error):
            raise
        raise TypeError(
            f"{name}.loss reads a column that is None ({error}): ask for heads and reference in needs, and put other "
            "columns into the batch"
        ) from error
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise TypeError(f"{name}.loss must return (loss, metrics), a tensor and a dict, got {type(returned).__name__}")
    summed, metrics = returned
    if not isinstance(summed, Tensor) or summed.ndim or not summed.requires_grad:
        raise TypeError(f"{name}.loss must return a tensor of no dimensions with a gradient, got {summed!r}")
    for key, value in metrics.items():
        is_pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, Tensor) for x in value)
        if not (is_pair or isinstance(value, Spread)):
            raise TypeError(f"{name}.loss gave the metric {key!r} as {value!r}: use mean_of or spread_of")
    with torch.no_grad():
        twice = loss(_twice(outputs, dim=-2), _twice(batch, dim=0))[0]
    if summed.detach().abs() > 1e-6 and torch.isclose(twice, summed.detach(), rtol=1e-4):
        raise ValueError(f"{name}.loss returns a mean, but must return a sum: the backend divides it by {name}.unit")
    return returned


def _same_class(cls: type, *names: str) -> tuple[Any, ...]:
    """The members `names` of the most derived class that defines any of them."""
    owner = next(base for base in cls.__mro__ if any(name in vars(base) for name in names))
    return tuple(vars(owner).get(name) for name in names)


def _twice(columns: TokenOutputs | TokenBatch, dim: int) -> Any:
    """The same rows two times."""
    named = ((name, getattr(columns, name)) for name in columns.__dataclass_fields__)
    twice = {name: torch.cat([x, x], dim=dim if x.ndim > 1 else 0) for name, x in named if isinstance(x, Tensor)}
    if "group" in twice:  # other groups, not larger ones
        twice["group"][len(columns) :] += int(twice["group"].max()) + 1
    return type(columns)(**twice)
