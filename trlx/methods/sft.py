"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import Metrics, mean_of


def sft_loss(outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
    """Cross-entropy, −Σ log p(token), summed over response tokens; its mean is reported as ``loss``."""
    loss = -outputs.logprobs[batch.at]
    return loss.sum(), {"loss": mean_of(loss)}
