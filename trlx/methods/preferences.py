"""Losses on preferences. Tensors are [B, T]. In pairs, row 2i is the chosen answer and row 2i + 1 the rejected one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import Metrics, mean_of, means_of


def dpo_loss(
    outputs: TokenOutputs,
    batch: TokenBatch,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
    sft_coef: float = 0.0,
    length_normalized: bool = False,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimization, summed over pairs. An answer's reward is β log π(y) / π_ref(y)::

        h = log π(y_w) / π_ref(y_w) − log π(y_l) / π_ref(y_l)   for the chosen answer y_w and the rejected y_l

    - "sigmoid" (arXiv:2305.18290, eq. 7): −(1 − ε) log σ(βh) − ε log σ(−βh); ε = `label_smoothing` is the share of
      pairs whose label is wrong (conservative DPO, https://ericmitchell.ai/cdpo.pdf).
    - "hinge" (arXiv:2305.10425, eq. 10, with the reference of DPO): max(0, 1 − βh).
    - "ipo" (arXiv:2310.12036, eq. 17): (h − 1 / 2β)².

    `length_normalized` divides the log-probabilities in h by the number of the answer's tokens. `sft_coef` adds that
    multiple of −log π(y_w) / `|y_w|` (arXiv:2404.19733, eq. 2). A pair without response tokens is padding.
    """
    mask = batch.response_mask
    lengths = mask.sum(dim=1).clamp(min=1)
    ratios = log_ratios(outputs, batch)
    logprobs = outputs.logprobs.masked_fill(~mask, 0.0).sum(dim=1)
    rewards = beta * (ratios / lengths if length_normalized else ratios)
    chosen, rejected = _halves(rewards, batch.pairs)
    margin = chosen - rejected
    if kind == "sigmoid":
        loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    elif kind == "hinge":
        loss = torch.relu(1 - margin)
    else:
        loss = (margin / beta - 1 / (2 * beta)).square()
    sft = -_halves(logprobs / lengths, batch.pairs)[0]
    loss = loss + sft_coef * sft
    columns = {"loss": loss, "losses/sft": sft, "accuracy": (margin > 0).float(), "margin": margin}
    for name, numbers in (("rewards", rewards), ("logprobs", logprobs)):
        columns[f"{name}/chosen"], columns[f"{name}/rejected"] = _halves(numbers, batch.pairs)
    return loss.sum(), means_of(columns)


def kto_loss(
    outputs: TokenOutputs,
    batch: TokenBatch,
    kl: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Kahneman-Tversky optimization (arXiv:2402.01306, eq. 8), summed over sequences; a score above 0 is "desirable".

    r = log π(y) / π_ref(y);   λ_D (1 − σ(β(r − z))) for desirable answers, λ_U (1 − σ(β(z − r))) for the others

    `kl` is z, the KL of policy and reference, a constant. The accuracy is the share of answers whose r is on the right
    side of z: above it if they are desirable. Rows without response tokens are padding.
    """
    ratios = log_ratios(outputs, batch)[batch.filled]
    desirable = batch.scores.sum(dim=1)[batch.filled] > 0
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    loss = weight * torch.sigmoid(-sign * beta * (ratios - kl))
    right = (sign * (ratios - kl) > 0).float()
    metrics = means_of({"loss": loss, "accuracy": right, "kl": torch.full_like(ratios, kl)})
    for name, rows in (("chosen", desirable), ("rejected", ~desirable)):
        metrics[f"rewards/{name}"] = mean_of(beta * ratios, rows)
    return loss.sum(), metrics


def log_ratios(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
    """log π(y) / π_ref(y) of each row's response, [B]."""
    mask = batch.response_mask
    # the difference of tokens, not of sums: it is exactly 0 where policy and reference agree
    return (outputs.logprobs.masked_fill(~mask, 0.0) - batch.ref_logprobs * mask).sum(dim=1)


def _halves(rows: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), both [pairs that count], of numbers [B]; `pairs` are the indices of those that count."""
    return rows[0::2][pairs], rows[1::2][pairs]
