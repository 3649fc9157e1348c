"""Samples of another policy than the one that trains: how far the two are apart, and weights that correct for it.

Tensors are [B, T] and entry ``[b, t]`` is about token t.
"""

from __future__ import annotations

from torch import Tensor

from trlx.methods.masked import Metrics, mean_of, spread_of


def importance_weights(logprobs: Tensor, drawn: Tensor, mask: Tensor, cap: float | None) -> tuple[Tensor, Metrics]:
    """Truncated importance weights (Ionides 2008, doi:10.1198/106186008X320456; ρ̄ of V-trace, arXiv:1802.01561).

    w = min(π / μ, cap),   KL(μ ‖ π) ≈ mean of π/μ − 1 − log π/μ

    Args:
        logprobs: float32, log π of the tokens under the policy that trains.
        drawn: float32, log μ, as the sampler gave them.
        mask: bool, True where the sampler gave one.
        cap: the largest weight; None: no limit.

    Returns:
        The weights, 1 outside `mask`, and metrics: the KL in nats per token, the weights' spread, and the share of
        tokens with a capped weight.
    """
    log_ratio = (logprobs - drawn).where(mask, 0.0)
    ratio = log_ratio.exp()
    weights = ratio if cap is None else ratio.clamp(max=cap)
    metrics: Metrics = {"rollouts/sampler_kl": mean_of(ratio - 1 - log_ratio, mask)}
    if cap is not None:
        metrics["rollouts/importance"] = spread_of(weights, mask)
        metrics["rollouts/importance_capped"] = mean_of(ratio > cap, mask)
    return weights, metrics
