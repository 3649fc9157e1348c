"""From scores to advantages: plain functions of tensors.

Tensors are [B, T] and entry ``[b, t]`` is about token t; a mask is True on response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trlx.methods.masked import RunningMoments


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalized advantage estimation (arXiv:1506.02438, eq. 16)::

        δₜ = rₜ + γ Vₜ₊₁ − Vₜ,   Aₜ = δₜ + γλ Aₜ₊₁,   Rₜ = Aₜ + Vₜ

    All tensors [B, T]; entry t is about token t. Tokens with mask False are stepped over: the next response token
    follows the last one, so tool output inside a response does not end the episode. Rewards and values at masked tokens
    are ignored, and both results are 0 there. V after the last response token is 0.
    """
    assert rewards.ndim == 2 and rewards.shape == values.shape == mask.shape
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values.masked_fill(~mask, 0.0)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """KL(policy ‖ reference) per token, estimated from tokens the policy sampled (http://joschu.net/blog/kl-approx.html).

    With log r = ref_logprobs − logprobs:  k1 = −log r (unbiased, may be negative),  k2 = (log r)² / 2 (biased, low
    variance),  k3 = r − 1 − log r (unbiased, never negative). Any shape; nats.

    Raises:
        ValueError: `estimator` is none of these.
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.expm1() - log_ratio
    raise ValueError(f"kl_estimator must be k1, k2 or k3, not {estimator!r}")


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float, estimator: str = "k1"
) -> Tensor:
    """Reward of each token: rₜ = scoreₜ − kl_coef · KLₜ where `mask` is True, 0 elsewhere. All tensors [B, T]."""
    assert scores.ndim == 2 and scores.shape == logprobs.shape == ref_logprobs.shape == mask.shape
    rewards = scores - kl_coef * kl_penalty(logprobs, ref_logprobs, estimator)
    return rewards.masked_fill(~mask, 0.0)


def group_advantages(scores: Tensor, group: Tensor, kind: str) -> Tensor:
    """How much better each sample is than the others of its group, from `scores` [B] and `group` int64 [B]; result [B].

    - "grpo" (arXiv:2402.03300): (score − mean) / (std + 1e-4) of the group, with the unbiased std.
    - "dr_grpo" (arXiv:2503.20783): score − mean of the group.
    - "rloo" (arXiv:2402.14740): score − mean of the **others** of the group.

    Raises:
        ValueError: `kind` is none of them.
    """
    assert scores.ndim == 1 and scores.shape == group.shape
    same = (group[:, None] == group[None, :]).double()
    size, x = same.sum(dim=1), scores.double()
    centred = x - same @ x / size
    if kind == "rloo":
        centred = centred * size / (size - 1).clamp(min=1)
    elif kind == "grpo":
        centred = centred / ((same @ centred.square() / (size - 1).clamp(min=1)).sqrt() + 1e-4)
    elif kind != "dr_grpo":
        raise ValueError(f"An advantage of groups must be grpo, dr_grpo or rloo, not {kind!r}")
    return centred.to(scores.dtype)


def rewards_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """The sum of the rewards from each response token to the last one; 0 elsewhere. All tensors [B, T]."""
    assert rewards.ndim == 2 and rewards.shape == mask.shape
    return rewards.masked_fill(~mask, 0.0).flip(1).cumsum(1).flip(1).masked_fill(~mask, 0.0)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft penalty for long responses (arXiv:2503.14476, eq. 13): `lengths` [B] to numbers from −1 to 0, [B].

    It is 0 up to max_length − buffer tokens, falls by 1 / buffer with each token after that, and is −1 at max_length.
    """
    return -((lengths - (max_length - buffer)) / buffer).clamp(0.0, 1.0)


@dataclass
class ScoreScale:
    """Clips scores, then divides them by a standard deviation; no mean is subtracted.

    The standard deviation is that of clipped scores: one unclipped outlier would make all other scores small.
    """

    by: str | bool | None = None
    """"running": the std of all scores so far; "ref": that of the first collection; any other value: 1."""
    limit: float | None = None
    """Scores are clipped to plus or minus this; None or 0: not clipped."""
    ref_std: float | None = None
    """For "ref": the std to use instead of the first collection's."""
    moments: RunningMoments = field(default_factory=RunningMoments)
    first_std: float | None = None
    """The std that "ref" divides by."""

    def __call__(self, scores: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The clipped and divided scores [B, T] of a whole collection, and statistics of undivided row sums."""
        clipped = scores.clamp(-self.limit, self.limit) if self.limit else scores
        mean, std = self.moments.update(clipped.sum(dim=1))
        if self.first_std is None:
            self.first_std = self.ref_std or std
        divisor = {"running": self.moments.std, "ref": self.first_std}.get(self.by)
        stats = {"mean": mean, "std": std, "running_mean": self.moments.mean, "running_std": self.moments.std}
        return clipped / divisor if divisor else clipped, stats

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs to go on from here."""
        return {"moments": self.moments.state_dict(), "first_std": self.first_std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.moments.load_state_dict(state["moments"])
        self.first_std = self.ref_std or state["first_std"]


def missing_eos_penalty(scores: Tensor, tokens: Tensor, mask: Tensor, eos_ids: list[int], penalty: float) -> Tensor:
    """`scores` minus `penalty` at the last response token of each row whose last response token is not in `eos_ids`."""
    assert scores.ndim == 2 and scores.shape == tokens.shape == mask.shape
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return scores - penalty * (is_last & ~torch.isin(tokens, torch.tensor(eos_ids)))


@dataclass
class FixedKL:
    """A constant KL coefficient."""

    coef: float

    def update(self, kl: float, n: int) -> None:
        """Is called with the mean KL per sequence (nats) of the last `n` rollouts; a fixed coefficient ignores it."""

    def state_dict(self) -> dict[str, float]:
        """Everything `load_state_dict` needs to go on from here."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Ignores `state`: a fixed coefficient is the one in the config."""


@dataclass
class AdaptiveKL(FixedKL):
    """A KL coefficient that moves the KL per sequence towards `target` nats (arXiv:1909.08593, section 2.2).

    coef ← coef · (1 + clip(KL / target − 1, ±0.2) · n / horizon), with `horizon` in rollouts.
    """

    target: float
    horizon: int

    def update(self, kl: float, n: int) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]
