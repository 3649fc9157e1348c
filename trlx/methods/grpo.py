"""Policy gradients without a value function: GRPO (arXiv:2402.03300) and the methods that differ in its parts.

Tensors are [B, T] and entry ``[b, t]`` is about token t; a mask is True on response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.advantages import kl_penalty
from trlx.methods.masked import Metrics, mean_of, means_of, spread_of
from trlx.methods.units import Unit

UNITS = {"grpo": Unit.SEQUENCE, "gspo": Unit.SEQUENCE, "dr_grpo": Unit.SEQUENCE, "dapo": Unit.TOKEN}
"""What each loss is a mean of."""


def grpo_loss(
    outputs: TokenOutputs,
    batch: TokenBatch,
    kind: str,
    cliprange: float,
    cliprange_high: float,
    max_length: int,
    kl_coef: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """The clipped objective with advantages of groups, plus `kl_coef` times the KL to the reference (k3)::

        ρ = π / π_old,   L = Σ w · [max(−A ρ, −A clip(ρ, 1 − cliprange, 1 + cliprange_high)) + kl_coef · KL]

    - "grpo" (arXiv:2402.03300, eq. 3): w = 1 / `|response|`, a mean over each sequence; summed over sequences.
    - "dr_grpo" (arXiv:2503.20783): w = 1 / `max_length`, the same for every sequence; summed over sequences.
    - "dapo" (arXiv:2503.14476, eq. 8): w = 1; summed over response tokens.
    - "gspo" (arXiv:2507.18071, eq. 5): as "grpo", but ρ = (π / π_old)^(1 / `|response|`) of the whole response.

    Returns the sum over units (see `UNITS`) and metrics. ``policy/ratio_deviation/max`` is max `|ρ − 1|`.
    """
    mask, at = batch.response_mask, batch.at
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    log_ratio = (outputs.logprobs - batch.old_logprobs) * mask
    if kind == "gspo":
        log_ratio = (log_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(mask)
    weight = {"dapo": torch.ones_like(lengths), "dr_grpo": torch.full_like(lengths, max_length)}.get(kind, lengths)
    weight = weight.reciprocal().expand_as(mask)[at]

    ratio, advantages = log_ratio[at].exp(), batch.advantages[at]
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange_high)
    policy_loss, is_clipped = torch.maximum(plain, clipped), clipped > plain
    columns = {
        "losses/policy_loss": policy_loss,
        "policy/approx_kl": ratio - 1 - ratio.log(),
        "policy/clipfrac": is_clipped,
        "policy/clipfrac_low": is_clipped & (advantages < 0),
        "policy/clipfrac_high": is_clipped & (advantages > 0),
        "ratio": ratio,
    }
    loss = policy_loss
    if kl_coef:
        kl = kl_penalty(outputs.logprobs[at], batch.ref_logprobs[at], "k3")
        loss, columns = policy_loss + kl_coef * kl, columns | {"losses/kl": kl}
    summed = (weight * loss).sum()
    metrics = means_of(columns) | {"losses/total_loss": (summed.detach().double(), UNITS[kind].count(batch).double())}
    metrics["policy/ratio_deviation"] = spread_of((ratio - 1).abs())
    metrics["padding_percentage"] = mean_of(~batch.attention_mask)
    return summed, metrics
