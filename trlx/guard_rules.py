"""The guards of a run: the number that each looks at, when it fires, and how ``train.guards`` is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trlx.strict import ConfigError, suggestion, unknown_key, with_numbers

ACTIONS = ("off", "warn", "skip", "stop")
ENDED_ONCE = 0.5
"""Where as large a share of responses ended once, responses at the limit are a change."""
MEMORY = 0.9
"""Of the mean of earlier value losses: what a step leaves of it."""
NGRAM, FEWEST_TOKENS, REPEATED = 4, 16, 0.5
"""See `repeating`."""

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rule:
    """A guard as the library ships it."""

    number: Callable[[Numbers, Numbers], float | None]
    """What is compared, from (what was measured, what `remember` kept); None: there is nothing to compare."""
    found: str
    """A sentence about it."""
    advice: str
    side: str = ""
    """"above" or "below": on which side of the limit the guard fires; "": where the number is not finite."""
    limit: float = 0.0
    action: str = "warn"


@dataclass(frozen=True, slots=True)
class Guard:
    """A guard as a config sets it."""

    action: str
    limit: float


def value_loss_growth(measured: Numbers, kept: Numbers) -> float | None:
    """How many times larger the value loss is than before, and than that of a value function that says 0.

    The second comparison spares the step in which the first rewards come.
    """
    loss, before = measured.get("losses/value_loss"), kept.get("value_loss")
    if loss is None or before is None:
        return None
    of_zero = (measured.get("returns/mean", 0.0) ** 2 + measured.get("returns/std", 0.0) ** 2) / 2
    return loss / max(before, of_zero, 1e-12)


def _measured(name: str) -> Callable[[Numbers, Numbers], float | None]:
    return lambda measured, kept: measured.get(name)


def _ended(measured: Numbers, kept: Numbers) -> float | None:
    return measured.get("rollouts/ended") if kept.get("ended", 0.0) >= ENDED_ONCE else None


RULES: dict[str, Rule] = {
    "kl": Rule(
        _measured("policy/kl"),
        "policy/kl is {:.4g} nats per sequence",
        "Raise method.init_kl_coef, set method.target, or lower optimizer.kwargs.lr",
        "above",
        50.0,
    ),
    "entropy": Rule(
        _measured("policy/entropy"),
        "policy/entropy is {:.4g} nats per token",
        "The samples are all but certain: raise the KL coefficient, or lower optimizer.kwargs.lr",
        "below",
        0.02,
    ),
    "lengths": Rule(
        _ended,
        "rollouts/ended has fallen to {:.4g}",
        "Responses now run into max_new_tokens: set method.missing_eos_penalty, or see what reward_fn gives long ones",
        "below",
        0.05,
    ),
    "scores": Rule(
        _measured("rollout_scores/std"),
        "rollout_scores/std is {:.4g}",
        "Equal scores do not say which samples are better: see what reward_fn returns for them, and whether "
        "method.cliprange_reward clips them all",
        "below",
        1e-6,
    ),
    "repeats": Rule(
        _measured("rollouts/repeating"),
        "rollouts/repeating is {:.4g}",
        "The samples repeat themselves or each other: lower optimizer.kwargs.lr, raise the KL coefficient, or start "
        "again from an earlier checkpoint",
        "above",
        0.5,
    ),
    "value_loss": Rule(
        value_loss_growth,
        "losses/value_loss is {:.4g} times what it was",
        "Lower optimizer.kwargs.lr or method.vf_coef, or set method.cliprange_value and method.scale_reward",
        "above",
        10.0,
    ),
    "non_finite": Rule(
        _measured("grad_norm"),
        "gradients are not finite",
        "If it goes on: lower optimizer.kwargs.lr, set train.max_grad_norm, or use bf16 instead of fp16",
        action="skip",
    ),
}
"""By name."""


def guards_of(written: Mapping[str, Any]) -> dict[str, Guard]:
    """The guards that are on, from ``train.guards``: ``{kl: stop, entropy: {action: warn, below: 0.1}}``.

    Raises:
        ConfigError: a name, an action or a limit is unknown.
    """
    for name in written:
        if name not in RULES:
            raise unknown_key("train.guards", name, RULES)
    found = {name: _guard(name, rule, written.get(name)) for name, rule in RULES.items()}
    return {name: guard for name, guard in found.items() if guard.action != "off"}


def judge(guards: Mapping[str, Guard], measured: Numbers, kept: Numbers) -> dict[str, tuple[float, bool]]:
    """What each guard has to judge in `measured`: its number, and whether it fires. A NaN fires."""
    numbers = ((name, RULES[name].number(measured, kept)) for name in guards)
    return {name: (number, _fires(name, number, guards[name].limit)) for name, number in numbers if number is not None}


def remember(kept: dict[str, Any], measured: Numbers, fired: Collection[str]) -> None:
    """Keeps in `kept` what later numbers are compared with. A value loss that fired is left out."""
    if "rollouts/ended" in measured:
        kept["ended"] = max(kept.get("ended", 0.0), measured["rollouts/ended"])
    loss = measured.get("losses/value_loss")
    if loss is not None and math.isfinite(loss) and "value_loss" not in fired:
        kept["value_loss"] = MEMORY * kept.get("value_loss", loss) + (1 - MEMORY) * loss


def repeating(responses: list[list[int]], prompts: list[list[int]]) -> float:
    """The share of responses that repeat themselves, or a response to another prompt.

    A response repeats itself if more than `REPEATED` of its n-grams (of `NGRAM` tokens) stand further up in it. Only
    responses of at least `FEWEST_TOKENS` count: short answers are alike for good reasons.
    """
    first: dict[tuple[int, ...], list[int]] = {}
    found = 0
    for response, prompt in zip(responses, prompts, strict=True):
        if len(response) < FEWEST_TOKENS:
            continue
        ngrams = len(response) - NGRAM + 1
        different = len(set(zip(*(response[start : start + ngrams] for start in range(NGRAM)), strict=True)))
        is_copy = first.setdefault(tuple(response), prompt) != prompt
        found += is_copy or different < (1 - REPEATED) * ngrams
    return found / max(len(responses), 1)


def _fires(name: str, number: float, limit: float) -> bool:
    within = {"above": number <= limit, "below": number >= limit, "": math.isfinite(number)}
    return not within[RULES[name].side]


def _guard(name: str, rule: Rule, written: Any) -> Guard:
    key, known = f"train.guards.{name}", ["action", *([rule.side] if rule.side else [])]
    given = with_numbers(written) if isinstance(written, Mapping) else {"action": written}
    for setting in given:
        if setting not in known:
            raise unknown_key(key, setting, known)
    action = given.get("action", rule.action)
    action = {None: rule.action, False: "off"}.get(action, action)  # YAML reads off as false
    # a step whose gradients are not finite never changes weights
    actions = ACTIONS if rule.side else ("skip", "stop")
    if action not in actions:
        near = suggestion(action, actions)
        raise ConfigError(f"{key}: unknown action {action!r}.{near} Known: {', '.join(actions)}")
    limit = given.get(rule.side, rule.limit)
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise ConfigError(f"{key}.{rule.side} must be a number, got {limit!r}")
    return Guard(action, float(limit))
