"""Implicit language Q-learning (arXiv:2206.11871).

Tensors are [B, T], or [H, B, T] with one row per Q head. Response tokens are the actions; ``values[b, t]`` is V of the
state in which token t was chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import Metrics, means_of, spread_of


def ilql_loss(
    outputs: TokenOutputs,
    batch: TokenBatch,
    *,
    tau: float,
    gamma: float,
    cql_scale: float,
    awac_scale: float,
    beta: float,
) -> tuple[Tensor, Metrics]:
    """The four losses of ILQL, summed over response tokens, with rewards r = ``batch.scores``::

        Q̂ = r + γ V(s′),  Q_t = min over target heads,  i runs over Q heads
        L_Q = Σ Σᵢ (Qᵢ − Q̂)²,   L_V = Σ |τ − 1[Q_t < V]| (Q_t − V)²   (expectile τ; arXiv:2110.06169, eq. 5)
        L_CQL = −Σ Σᵢ log softmax(Qᵢ)[a],   L_AWAC = −Σ log π(a) exp(β (Q_t − V))
        L = L_Q + L_V + cql_scale L_CQL + awac_scale L_AWAC

    s′ is the state of the row's next response token, so later user turns are skipped; after the last one V(s′) is 0.
    Q̂, Q_t and the AWAC weight have no gradient: V learns only from L_V, the policy only from L_AWAC.
    """
    at = batch.at
    logprobs, values, rewards = outputs.logprobs[at], outputs.values[at], batch.scores[at]
    q, q_logprobs = outputs.q[:, *at], outputs.q_logprobs[:, *at]
    target_q = outputs.target_q[:, *at].detach().amin(dim=0)

    wanted_q = rewards + gamma * _next_values(values.detach(), at[0])
    loss_q = (q - wanted_q).square().sum(dim=0)
    expectile = torch.where(target_q >= values, tau, 1 - tau)
    loss_v = expectile * (target_q - values).square()
    loss_cql = -q_logprobs.sum(dim=0)
    awac_weight = (beta * (target_q - values)).exp().detach()
    loss_awac = -logprobs * awac_weight

    loss = loss_q + loss_v + cql_scale * loss_cql + awac_scale * loss_awac
    metrics = means_of(
        {
            "losses/loss": loss,
            "losses/loss_q": loss_q,
            "losses/loss_v": loss_v,
            "losses/loss_cql": loss_cql,
            "losses/loss_awac": loss_awac,
        }
    )
    metrics |= {"values": spread_of(values), "awac_weight": spread_of(awac_weight)}
    metrics |= {f"qvalues/{i}": spread_of(head) for i, head in enumerate(q)}
    return loss.sum(), metrics


@torch.no_grad()
def polyak_(target: nn.Module, source: nn.Module, alpha: float) -> None:
    """target ← alpha · source + (1 − alpha) · target, parameter by parameter; alpha 1 copies."""
    for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
        slow.lerp_(fast, alpha)


def normalize_returns(returns: list[float]) -> list[float]:
    """Returns of the whole data set minus their mean, divided by their unbiased std; all 0 if all are equal."""
    if len(set(returns)) < 2:
        # the rounding error of the mean, divided by a std of nearly 0, would be a large number
        return [0.0] * len(returns)
    x = torch.tensor(returns, dtype=torch.float64)
    return ((x - x.mean()) / x.std()).tolist()


def shifted_logits(logits: Tensor, q_min: Tensor, v: Tensor, beta: float) -> Tensor:
    """The logits that ILQL samples from: log π(a) + β (Q(a) − V).

    `logits` and `q_min` (the minimum over target heads) are [..., V], `v` is [...]. Top-k and temperature are applied
    afterwards.
    """
    assert logits.shape == q_min.shape and v.shape == logits.shape[:-1]
    return logits.log_softmax(dim=-1) + beta * (q_min - v.unsqueeze(-1))


def _next_values(values: Tensor, row: Tensor) -> Tensor:
    """For each response token, `values` [N] at the next one of the same `row` [N]; 0 at the last."""
    following = torch.zeros_like(values)
    following[:-1] = values[1:] * (row[1:] == row[:-1])
    return following
