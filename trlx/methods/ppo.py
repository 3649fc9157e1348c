"""Proximal policy optimization (arXiv:1707.06347) with a KL penalty to the first policy (arXiv:1909.08593).

Tensors are [B, T] and entry ``[b, t]`` is about token t; a mask is True on response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import Metrics, mean_of, means_of, spread_of


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalized advantage estimation (arXiv:1506.02438, eq. 16).

    δₜ = rₜ + γ Vₜ₊₁ − Vₜ,   Aₜ = δₜ + γλ Aₜ₊₁,   Rₜ = Aₜ + Vₜ

    All tensors [B, T]; entry t is about token t. Tokens with mask False are stepped over: the next response token
    follows the last one, so tool output inside a response does not end the episode. Rewards and values there are not
    read, and both results are 0 there. V after the last response token is 0.
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
        ValueError: `estimator` is none of them.
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


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """Scores clipped to ±`limit`; as they are where that is None or 0."""
    return scores.clamp(-limit, limit) if limit else scores


def scale_scores(scores: Tensor, std: float | None) -> Tensor:
    """Scores divided by `std`; as they are where that is None or 0. The mean stays."""
    return scores / std if std else scores


def missing_eos_penalty(scores: Tensor, tokens: Tensor, mask: Tensor, eos_ids: list[int], penalty: float) -> Tensor:
    """`scores` less `penalty` at the last response token of every row where that is none of `eos_ids`."""
    assert scores.ndim == 2 and scores.shape == tokens.shape == mask.shape
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return scores - penalty * (is_last & ~torch.isin(tokens, torch.tensor(eos_ids)))


@dataclass
class FixedKL:
    """A KL coefficient that stays as it is."""

    coef: float

    def update(self, kl: float, n: int) -> None:
        """Hears the mean KL per sequence (nats) of the last `n` rollouts."""

    def state(self) -> dict[str, float]:
        """Everything `load` needs to go on from here."""
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        """Restores what `state` returned; a fixed coefficient stays what it was made with."""


@dataclass
class AdaptiveKL(FixedKL):
    """A KL coefficient steered towards a KL per sequence of `target` nats (arXiv:1909.08593, section 2.2).

    coef ← coef · (1 + clip(KL / target − 1, ±0.2) · n / horizon), with `horizon` in rollouts.
    """

    target: float
    horizon: int

    def update(self, kl: float, n: int) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon

    def load(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


def ppo_loss(
    scores: TokenOutputs,
    batch: TokenBatch,
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """The clipped objective (arXiv:1707.06347, eq. 7) and clipped value loss, summed over response tokens.

    ρ = π / π_old,   L_π = Σ max(−A ρ, −A clip(ρ, 1−c, 1+c))
    L_V = ½ Σ max((V − R)², (V_clip − R)²),   V_clip = V_old + clip(V − V_old, ±c_V),   L = L_π + vf_coef L_V

    `dual_clip` d > 1 bounds the loss by −A d where A < 0 (arXiv:1912.09729), however large ρ is. Advantages are used
    as they are: they were whitened over the whole collection.

    Returns the sum and its metrics; ``policy/ratio_deviation/max`` is max |ρ − 1|, 0 on a collection's first update.
    """
    mask = batch.response_mask
    logprobs, old_logprobs, advantages = scores.logprobs[mask], batch.old_logprobs[mask], batch.advantages[mask]
    values, old_values, returns = scores.values[mask], batch.old_values[mask], batch.returns[mask]

    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    policy_plain, policy_clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    policy_loss = torch.maximum(policy_plain, policy_clipped)
    if dual_clip is not None:
        # Where A >= 0 the loss is not above 0, so this bound acts on A < 0 alone.
        policy_loss = policy_loss.minimum(advantages.abs() * dual_clip)

    clipped_values = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    value_plain, value_clipped = (values - returns).square(), (clipped_values - returns).square()
    value_loss = torch.maximum(value_plain, value_clipped) / 2

    loss = policy_loss + vf_coef * value_loss
    metrics = means_of(
        {
            "losses/total_loss": loss,
            "losses/policy_loss": policy_loss,
            "losses/value_loss": value_loss,
            "values/values_error": value_plain,
            "values/values_mape_error": (values - returns).abs() / (returns + 1e-2).abs(),
            "values/clipfrac": value_clipped > value_plain,
            "policy/approx_kl": ratio - 1 - log_ratio,
            "policy/clipfrac": policy_clipped > policy_plain,
            "ratio": ratio,
        }
    )
    metrics["policy/ratio_deviation"] = spread_of((ratio - 1).abs())
    metrics |= {"values": spread_of(values), "old_values": spread_of(old_values), "returns": spread_of(returns)}
    metrics["padding_percentage"] = mean_of(~batch.attention_mask)
    return loss.sum(), metrics
