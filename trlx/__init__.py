"""Reinforcement learning from human feedback for language models.

The public names, each imported on first use, so that ``import trlx`` stays quick and loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "1.0.0.dev0"

_HOMES = {
    "train": "trlx.api",
    "TRLConfig": "trlx.config",
    "load_preset": "trlx.presets",
    "register_trainer": "trlx.registry",
    "register_method": "trlx.registry",
    "register_datapipeline": "trlx.registry",
    "register_sampler": "trlx.registry",
    "register_architecture": "trlx.registry",
    "SequenceClassifierReward": "trlx.rewards.classifier",
    "RemoteReward": "trlx.rewards.remote",
    "WeightedRewards": "trlx.rewards.weighted",
}

__all__ = ["__version__", "logging", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "logging":
        return importlib.import_module("trlx.logging")
    if name not in _HOMES:
        raise AttributeError(f"module 'trlx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _OldPaths:
    """Looks up names under ``trlx.`` that Python cannot find in the tables of `trlx.compat.imports`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.import_module("trlx.compat.imports").find_spec(name) if name.startswith("trlx.") else None


sys.meta_path.append(_OldPaths)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
