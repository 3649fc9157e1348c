"""Reinforcement learning from human feedback for language models.

The public names, each imported on first use, so that ``import trlx`` stays quick and loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

__version__ = "1.0.0.dev0"

_NAMES = {
    "trlx.api": "train",
    "trlx.config": "TRLConfig",
    "trlx.presets": "load_preset",
    "trlx.registry": (
        "register_trainer register_method register_datapipeline register_sampler register_architecture register_tracker"
    ),
    "trlx.run.callbacks": "Callback EarlyStopping",
    "trlx.rewards.classifier": "SequenceClassifierReward",
    "trlx.rewards.remote": "RemoteReward",
    "trlx.rewards.weighted": "WeightedRewards",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", "logging", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "logging":
        return importlib.import_module("trlx.logging")
    if name not in _HOMES:
        raise AttributeError(f"module 'trlx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _find_old(name: str, *_: Any) -> Any:
    return importlib.import_module("trlx.compat.imports").find_spec(name) if name.startswith("trlx.") else None


# for names that Python cannot find: the import paths of CarperAI's trlx
sys.meta_path.append(SimpleNamespace(find_spec=_find_old))
