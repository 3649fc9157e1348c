"""The cheapest changes of a run that does not fit, found by planning the run with each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from trlx.config import TrainConfig, TRLConfig
from trlx.strict import ConfigError

LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32}
SHARED = "--accelerate"
"""The change that is an argument of the command and no setting."""
OTHER_NUMBERS = (
    "model.num_layers_unfrozen",
    "model.peft_config",
    "optimizer.name",
    "train.mixed_precision",
)
"""Settings with which a run learns something else, or computes in fewer bits."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A run on paper."""

    peak: float
    """Bytes of the phase that needs most."""
    excess: float
    """Bytes above the limit, summed over the phases."""
    seconds: float
    """Of a step."""


Assess = Callable[[Settings], Verdict]


@dataclass(frozen=True)
class Change:
    """Settings with which a run fits."""

    settings: Settings
    verdict: Verdict

    @property
    def cost(self) -> tuple[bool, float]:
        """Changes that leave all numbers as they are (but for rounding) come first, then those that take less time."""
        return any(name in OTHER_NUMBERS for name in self.settings), self.verdict.seconds

    def __str__(self) -> str:
        return " ".join(
            f"{name} {value}" if name == SHARED else f"{name}={_written(value)}"
            for name, value in self.settings.items()
        )


def cheapest(ladders: list[list[Settings]], assess: Assess, count: int = 3) -> list[Change]:
    """The `count` cheapest changes with which all phases fit; pairs of changes where too few are enough alone.

    Args:
        ladders: changes of one kind each, the mildest first; of each kind only the mildest one that fits counts.
    """
    before = assess({}).excess
    strongest = [_tried(ladder[-1], assess) for ladder in ladders]
    helpful = [
        ladder
        for ladder, change in zip(ladders, strongest, strict=True)
        if change is not None and change.verdict.excess < before
    ]
    found = _fitting(helpful, assess)
    if len(found) < count:
        alone = [change.settings for change in found]
        rest = [ladder for ladder in helpful if not any(settings in ladder for settings in alone)]
        for first, second in combinations(rest, 2):
            for change in _fitting([[first[-1] | mild for mild in second]], assess):
                milder = {name: value for name, value in change.settings.items() if name not in first[-1]}
                found += _fitting([[mild | milder for mild in first]], assess)
    return sorted(found, key=lambda change: change.cost)[:count]


def ladders_of(config: TRLConfig, rows: int, layers: int, is_half: bool, shareable: bool) -> list[list[Settings]]:
    """What can be changed for less memory, on either backend.

    Args:
        rows: of a microbatch.
        layers: of the model.
        shareable: the processes hold equal weights on Accelerate, and could share them.
    """
    train, method, model = config.train, config.method, config.model
    is_nemo = train.trainer.startswith("NeMo")
    chunk = getattr(method, "chunk_size", None)
    adam = {"adam": "adam_8bit_bnb", "adamw": "adamw_8bit_bnb"}.get(config.optimizer.name)
    trains_all = model.peft_config is None and model.num_layers_unfrozen == -1
    fewer = [n for n in _halves(rows) if train.batch_size % n == 0]
    # under FSDP the rows of a pass are not fitted to the memory
    shared: Settings = {SHARED: "fsdp2"}
    if not train.minibatch_size:
        shared["train.minibatch_size"] = _divisor(train, rows)
    asked = {
        "train.gradient_checkpointing": ["selective", True] if not train.gradient_checkpointing else [],
        "train.minibatch_size": fewer,
        "method.chunk_size": [] if chunk is None else _halves(chunk),
        "train.cache_hidden_states": ["off"] if train.cache_hidden_states != "off" and not trains_all else [],
        "train.offload_optimizer": [True] if not is_nemo and not train.offload_optimizer else [],
        "train.mixed_precision": [] if is_half else ["bf16"],
        "optimizer.name": [adam] if adam and not is_nemo else [],
        "model.num_layers_unfrozen": [n for n in (layers // 2, 2) if 0 < n < layers] if trains_all else [],
        "model.peft_config": [LORA] if model.peft_config is None and not is_nemo else [],
    }
    ladders = [[{name: value} for value in values] for name, values in asked.items() if values]
    return [[shared], *ladders] if shareable else ladders


def _divisor(train: TrainConfig, rows: int) -> int:
    """The most rows, up to `rows`, that divide the batch."""
    return max(n for n in range(1, rows + 1) if train.batch_size % n == 0)


def _halves(number: int) -> list[int]:
    return [number >> shift for shift in range(1, number.bit_length())]


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {each}" for name, each in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fitting(ladders: list[list[Settings]], assess: Assess) -> list[Change]:
    """Of each ladder the mildest change that fits: those above it fit as well, so halve what is left to try."""
    found = []
    for ladder in ladders:
        last = _tried(ladder[-1], assess)
        if last is None or last.verdict.excess:
            continue
        low, high = 0, len(ladder) - 1
        while low < high:
            middle = (low + high) // 2
            change = _tried(ladder[middle], assess)
            if change is None or change.verdict.excess:
                low = middle + 1
            else:
                last, high = change, middle
        found.append(last)
    return found


def _tried(settings: Settings, assess: Assess) -> Change | None:
    """None if the change does not go together with other settings, or an extra is missing."""
    try:
        return Change(settings, assess(settings))
    except (ConfigError, ImportError):
        return None
