"""The loss of a reward model, and how well its probabilities are calibrated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import Metrics, mean_of, spread_of


def reward_loss(outputs: TokenOutputs, batch: TokenBatch, center_coef: float = 0.0) -> tuple[Tensor, Metrics]:
    """-log sigmoid(r_chosen - r_rejected - margin) + center_coef (r_chosen + r_rejected)^2, summed over pairs.

    The rewards are ``outputs.last`` [B]; rows 2i (chosen) and 2i + 1 (rejected) are one pair, whose margin is the score
    of its chosen row. Rows without a response token only fill up the batch.
    """
    chosen, rejected, margin = (
        x[batch.pairs] for x in (outputs.last[0::2], outputs.last[1::2], batch.scores[0::2].sum(1))
    )
    ahead = chosen - rejected
    loss = -logsigmoid(ahead - margin) + center_coef * (chosen + rejected).square()
    metrics = {
        "loss": mean_of(loss),
        "accuracy": mean_of((ahead > 0).float()),
        "margin": mean_of(ahead),
        "rewards": spread_of(torch.cat([chosen, rejected])),
    }
    return loss.sum(), metrics


def calibration_error(ahead: Tensor) -> float:
    """The expected calibration error in 10 equal bins of sigmoid(r_chosen - r_rejected), from the differences `ahead`.

    A pair counts in both orders: p = sigmoid(ahead) that its first answer is better, which is true, and 1 - p, which is
    not. The confidence in the answer that the model prefers says the same, so only that is looked at. [N] to [0, 1].
    """
    confidence = ahead.double().abs().sigmoid()
    right = (ahead.sign().double() + 1) / 2
    bins = (confidence * 10).long().clamp(max=9)
    gaps = torch.zeros(10, dtype=torch.float64).index_add(0, bins, confidence - right)
    return float(gaps.abs().sum() / len(ahead))
