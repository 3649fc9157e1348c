"""Several reward functions as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trlx.data.prompts import RESERVED
from trlx.rewards.calling import UserFunction
from trlx.tracebacks import short_errors


class Part(UserFunction):
    """One of the functions whose weighted sum is the score, logged under `key`; "" if reward_fn is one function."""

    def __init__(self, fn: Callable[..., Any], key: str = "", weight: float = 1.0):
        super().__init__(f"reward_fn's {key!r}" if key else "reward_fn", fn, unasked=RESERVED)
        self.key = key
        self.weight = weight


class WeightedRewards:
    """Several reward functions: a score is the sum of what they return, each times its weight.

    ``trlx.train(reward_fn=WeightedRewards({"helpful": (judge, 1.0), "short": (brevity, 0.1)}), prompts=[...])``

    `rewards` is a dict of pairs (function, weight) by name, or a list of such pairs, which get the functions' names. A
    function without a weight has weight 1. Results are logged by name before they are multiplied, so weight 0 means:
    only log it. Raises a ValueError if there is no function or one is called mean, and a TypeError if an entry is not
    such a pair.
    """

    @short_errors
    def __init__(self, rewards: Mapping[str, Any] | Iterable[Any]):
        if isinstance(rewards, Mapping):
            pairs = {str(name): _pair(entry) for name, entry in rewards.items()}
        else:
            pairs = {}
            for fn, weight in map(_pair, rewards):
                pairs[_name(fn, pairs)] = fn, weight
        if not pairs:
            raise ValueError("There is no reward function in the list: pass at least one")
        if "mean" in pairs:
            raise ValueError("No part of a reward can be called 'mean': reward/mean is another number. Rename it")
        self.parts = [Part(fn, name, weight) for name, (fn, weight) in pairs.items()]


def parts_of(reward_fn: Any) -> list[Part]:
    """The parts of what the user passes as reward_fn: a function, a list or dict of them, or `WeightedRewards`."""
    if isinstance(reward_fn, (list, tuple, Mapping)):
        reward_fn = WeightedRewards(reward_fn)
    if isinstance(reward_fn, WeightedRewards):
        return reward_fn.parts
    return [Part(reward_fn)]


def _pair(entry: Any) -> tuple[Callable[..., Any], float]:
    fn, weight = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (entry, 1.0)
    if not callable(fn) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise TypeError(f"A part of the reward is a function, or (function, weight), got {repr(entry)[:80]}")
    return fn, float(weight)


def _name(fn: Callable[..., Any], taken: Mapping[str, Any]) -> str:
    name = getattr(fn, "__name__", type(fn).__name__)
    if not name.isidentifier():  # "<lambda>"
        return f"reward_{len(taken)}"
    return name if name not in taken else f"{name}_{len(taken)}"
