"""What may end a run early: gradients that are not finite, a policy that differs from its reference."""

from __future__ import annotations

import torch

from trlx import logging
from trlx.backends import distress
from trlx.backends.base import Backend
from trlx.batch import TokenBatch
from trlx.sampling.settings import DIVERGED

logger = logging.get_logger(__name__)

FIRST_RATIO_TOLERANCE = 1e-3
"""How far the first ratio may be from 1 without a warning; float32 stays within 1e-5."""
REAL_DIFFERENCE = 1e-3
"""Nats per token; rounding errors in float32 are smaller."""
MOST_SKIPPED_IN_A_ROW = 25
"""Steps with non-finite gradients after which a run gives up; fp16 needs a few to find its loss scale."""


class SkippedSteps:
    """Counts the steps that changed nothing because gradients were not finite."""

    def __init__(self):
        self.total = 0
        self.in_a_row = 0

    def count(self, metrics: dict[str, float], step: int) -> None:
        """Counts one step by its ``skipped_steps`` (0 or 1), which it replaces by the run's total.

        Raises:
            FloatingPointError: `MOST_SKIPPED_IN_A_ROW` steps in a row were skipped.
        """
        skipped = bool(metrics["skipped_steps"])
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        metrics["skipped_steps"] = float(self.total)
        if skipped:
            until = "; no checkpoint is written until a step updates something" if self.in_a_row == 1 else ""
            logger.warning(f"Step {step}: gradients are not finite, nothing was updated{until}")
        if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"Gradients were not finite in {MOST_SKIPPED_IN_A_ROW} steps in a row. Lower optimizer.kwargs.lr, set "
                "train.max_grad_norm, or use bf16 instead of fp16"
            )


def check_first_kl(per_token: float, precision: torch.dtype) -> None:
    """Before the first update policy and reference are equal, so their KL is 0 up to rounding.

    The sums in some kernels depend on the shape of the batch, so two passes give a token two log-probabilities. If
    these differ by d, k3 is d² / 2. Rounding explains d = 16 eps of `precision` (logits are about 16 to 32), and
    d = 128 eps of float32 (sums have thousands of terms). A larger KL gets a warning. A KL more than 4 times as large,
    and above `REAL_DIFFERENCE`, ends the run.

    Args:
        per_token: mean KL over response tokens (k3; nats).
        precision: the dtype in which log-probabilities are computed.

    Raises:
        RuntimeError: policy and reference differ.
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
        f"{found} instead of 0: this model gives two outputs for one input (random routing, or a buffer that changes "
        "in forward), so PPO would train on noise"
    )


def check_first_ratio(deviation: float) -> None:
    """Warns if the probability ratio of the first minibatch, which should be 1, is further away than rounding explains.

    Args:
        deviation: the largest |ratio - 1|.
    """
    if deviation > FIRST_RATIO_TOLERANCE:
        logger.warning(
            f"On the first minibatch the probability ratio is up to {deviation:.3g} away from 1: training computes "
            "other log-probabilities than sampling did (low precision, or a module that differs in train mode)"
        )


def check_weights(backend: Backend, batch: TokenBatch) -> None:
    """Refuses to save a model that has diverged. Called on every process.

    Raises:
        FloatingPointError: log-probabilities, or scores, of `batch` are not finite.
    """
    outputs = backend.evaluate(batch)
    said = outputs.logprobs if outputs.last is None else outputs.last
    if backend.any_process(not said.isfinite().all()):
        raise distress.shared(FloatingPointError(DIVERGED))
