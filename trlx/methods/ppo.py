"""Proximal policy optimization (arXiv:1707.06347) with a KL penalty to the first policy (arXiv:1909.08593).

Tensors are [B, T] and entry ``[b, t]`` is about token t; a mask is True on response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import Metrics, mean_of, means_of, spread_of


def ppo_loss(
    outputs: TokenOutputs,
    batch: TokenBatch,
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """The clipped objective (arXiv:1707.06347, eq. 7) and clipped value loss, summed over response tokens::

        ρ = π / π_old,   L_π = Σ max(−A ρ, −A clip(ρ, 1−c, 1+c))
        L_V = ½ Σ max((V − R)², (V_clip − R)²),   V_clip = V_old + clip(V − V_old, ±c_V),   L = L_π + vf_coef L_V

    `dual_clip` d > 1 bounds the loss by −A d where A < 0 (arXiv:1912.09729), for any ρ. Advantages are not whitened
    here: they were whitened over the whole collection.

    Returns the sum and its metrics; ``policy/ratio_deviation/max`` is max `|ρ − 1|`, 0 on a collection's first update.
    """
    at = batch.at
    logprobs, old_logprobs, advantages = outputs.logprobs[at], batch.old_logprobs[at], batch.advantages[at]
    values, old_values, returns = outputs.values[at], batch.old_values[at], batch.returns[at]

    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    policy_plain, policy_clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    policy_loss, is_clipped = torch.maximum(policy_plain, policy_clipped), policy_clipped > policy_plain
    if dual_clip is not None:
        # where A >= 0 the loss is at most 0, so this bound changes only tokens with A < 0
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
            "policy/clipfrac": is_clipped,
            "policy/clipfrac_low": is_clipped & (advantages < 0),
            "policy/clipfrac_high": is_clipped & (advantages > 0),
            "ratio": ratio,
        }
    )
    metrics["policy/ratio_deviation"] = spread_of((ratio - 1).abs())
    metrics |= {"values": spread_of(values), "old_values": spread_of(old_values), "returns": spread_of(returns)}
    metrics["padding_percentage"] = mean_of(~batch.attention_mask)
    return loss.sum(), metrics
