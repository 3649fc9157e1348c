"""Checks that cost nothing: every run makes them before its first step, and ``trlx check`` beside others."""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from trlx import logging
from trlx.config import TrainConfig, TRLConfig
from trlx.run import Trainer

logger = logging.get_logger(__name__)

GIB = 2**30
MOMENTS = 2
"""Running averages that Adam keeps for each weight that trains."""


class Finding(NamedTuple):
    """What a check found."""

    level: str
    """"error": the run would fail; "warning"; "note"."""
    about: str
    """One word."""
    says: str
    """What is the case, and what to do."""


def at_start(trainer: Trainer) -> None:
    """Logs what is found before the first step. Called on every process."""
    size = checkpoint_size(trainer.config, *trainer.backend.parameter_counts())
    for finding in (*versions(), *disk(trainer.config.train, size, trainer.total_steps)):
        logger.warning(finding.says)


@functools.cache
def versions() -> list[Finding]:
    """Installed packages outside the ranges that this version of trlx is for."""
    try:
        asked = [Requirement(text) for text in importlib.metadata.requires("trlx") or []]
    except importlib.metadata.PackageNotFoundError:  # a clone on PYTHONPATH
        return []
    found = {}
    for each in asked:
        is_extra = each.marker is not None and not each.marker.evaluate({"extra": ""})
        try:
            has = importlib.metadata.version(each.name)
        except importlib.metadata.PackageNotFoundError:
            has = None
        if has is None and not is_extra:
            found[each.name] = f"{each.name} is not installed: pip install '{each.name}{each.specifier}'"
        # a pin with == is that of another environment
        elif has and "==" not in str(each.specifier) and not each.specifier.contains(has, prereleases=True):
            needs = f"{each.name}{each.specifier}"
            found[each.name] = f"{each.name} {has} is installed, and trlx is made for {needs}: pip install '{needs}'"
    return [Finding("warning", "versions", says) for says in found.values()]


def checkpoint_size(config: TRLConfig, trained: int, frozen: int) -> float:
    """About how many bytes a checkpoint takes, from numbers of weights: those that train, with their running averages,
    and the whole model for transformers, or the adapter alone."""
    averages = MOMENTS if config.train.save_optimizer and config.optimizer.name != "sgd" else 0
    half = str(config.model.model_extra_configs.get("dtype")).endswith("16")
    exported = 4 * trained if config.model.peft_config is not None else (2 if half else 4) * (trained + frozen)
    return 4 * trained * (1 + averages) + exported


def disk(train: TrainConfig, size: float, last_step: int | None) -> Iterator[Finding]:
    """Whether checkpoints of `size` bytes fit on the disk: those that are kept, the best one, and one in the making."""
    folder = Path(train.checkpoint_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    due = -(-(last_step or 1) // (train.checkpoint_interval or train.eval_interval))
    count = min(due, (train.keep_checkpoints or due) + 1) + train.save_best
    each = f"A checkpoint takes about {size / GIB:.2f} GiB, and {free / GIB:.2f} are free at {there}"
    if size > free:
        yield Finding("error", "disk", f"{each}: free some, or name another folder in train.checkpoint_dir")
    elif size * count > free:
        fewer = int(free // size) - 1 - train.save_best
        advice = f"write train.keep_checkpoints={fewer}" if fewer > 0 else "free some"
        yield Finding(
            "warning", "disk", f"{each}, but up to {count} are there at once: {advice}, or name another folder"
        )
