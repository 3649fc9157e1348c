"""What must hold where PPO begins: policy and reference are one, and the policy that sampled is the one that trains."""

from __future__ import annotations

import torch

from trlx import logging

logger = logging.get_logger(__name__)

FIRST_RATIO_TOLERANCE = 1e-3
"""How far the first ratio may be from 1 without a word; float32 stays within 1e-5."""
REAL_DIFFERENCE = 1e-3
"""Nats per token that are no rounding in float32."""


def check_first_kl(per_token: float, precision: torch.dtype) -> None:
    """Before any update policy and reference are one, so their KL is 0, up to rounding: most often exactly.

    Kernels whose sums depend on the shape of a batch give a token two log-probabilities. Where these are d apart, k3 is
    d² / 2. Rounding explains a d of 16 eps of the precision, as far apart as logits of 16 to 32 are, and of 128 eps of
    float32, in which thousands of terms are added up. What is above that is warned of; what is 4 times above, and above
    `REAL_DIFFERENCE`, ends the run.

    Args:
        per_token: mean KL over response tokens (k3; nats).
        precision: that log-probabilities are computed in.

    Raises:
        RuntimeError: policy and reference are two.
    """
    rounding = max(16 * torch.finfo(precision).eps, 128 * torch.finfo(torch.float32).eps) ** 2 / 2
    if per_token <= rounding:
        return
    found = f"Before the first update the KL between policy and reference is {per_token:.3g} nats per token"
    if per_token <= max(4 * rounding, REAL_DIFFERENCE):
        logger.warning(
            f"{found}, where rounding ({str(precision).removeprefix('torch.')}) explains {rounding:.1g} at most: the "
            "KL penalty has noise of this size"
        )
        return
    raise RuntimeError(
        f"{found} instead of 0: this model has two answers to one input (random routing, or a buffer that changes in "
        "forward), so PPO would train on noise"
    )


def check_first_ratio(deviation: float) -> None:
    """On the first minibatch the probability ratio is 1; warns where it is up to `deviation` away and that is more than
    rounding."""
    if deviation > FIRST_RATIO_TOLERANCE:
        logger.warning(
            f"On the first minibatch the probability ratio is up to {deviation:.3g} away from 1: the policy that is "
            "trained is not quite the one that sampled (low precision, or a module that is another in training)"
        )
