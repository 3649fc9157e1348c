"""Losses on pairs of answers, of which one was chosen. Tensors are [B, T]; rows 2i (chosen) and 2i + 1 are one pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import Metrics, means_of


def dpo_loss(
    outputs: TokenOutputs,
    batch: TokenBatch,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
    sft_coef: float = 0.0,
    length_normalized: bool = False,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimization, summed over pairs. An answer's reward is β log π(y) / π_ref(y).

    h = log π(y_w) / π_ref(y_w) − log π(y_l) / π_ref(y_l)   for the chosen answer y_w and the rejected y_l

    - "sigmoid" (arXiv:2305.18290, eq. 7): −(1 − ε) log σ(βh) − ε log σ(−βh); ε = `label_smoothing` is the share of
      pairs whose label is wrong (conservative DPO, https://ericmitchell.ai/cdpo.pdf).
    - "hinge" (arXiv:2305.10425, eq. 10, with the reference of DPO): max(0, 1 − βh).
    - "ipo" (arXiv:2310.12036, eq. 17): (h − 1 / 2β)².

    `length_normalized` divides the log-probabilities in h by the number of the answer's tokens. `sft_coef` adds that
    multiple of −log π(y_w) / |y_w| (arXiv:2404.19733, eq. 2). A pair without response tokens is padding.
    """
    mask = batch.response_mask
    counts = mask.any(dim=1)[0::2]
    lengths = mask.sum(dim=1).clamp(min=1)
    logprobs = outputs.logprobs.masked_fill(~mask, 0.0)
    # the difference of tokens, not of sums: it is exactly 0 where policy and reference agree
    ratios = (logprobs - batch.ref_logprobs * mask).sum(dim=1)
    logprobs = logprobs.sum(dim=1)
    rewards = beta * (ratios / lengths if length_normalized else ratios)
    chosen, rejected = _halves(rewards, counts)
    margin = chosen - rejected
    if kind == "sigmoid":
        loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    elif kind == "hinge":
        loss = torch.relu(1 - margin)
    else:
        loss = (margin / beta - 1 / (2 * beta)).square()
    sft = -_halves(logprobs / lengths, counts)[0]
    loss = loss + sft_coef * sft
    columns = {"loss": loss, "losses/sft": sft, "accuracy": (margin > 0).float(), "margin": margin}
    for name, numbers in (("rewards", rewards), ("logprobs", logprobs)):
        columns[f"{name}/chosen"], columns[f"{name}/rejected"] = _halves(numbers, counts)
    return loss.sum(), means_of(columns)


def _halves(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), both [pairs that count], of numbers [B]."""
    return rows[0::2][counts], rows[1::2][counts]
