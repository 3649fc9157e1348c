"""Log-probabilities and Q of chosen tokens, computed from logits that are sharded by vocabulary.

Tensor ranks exchange one number per token and reduction. No rank gathers all logits in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from trlx.backends.megatron.parallel import tensor_group


@dataclass(frozen=True)
class VocabularyShard:
    """This tensor rank holds columns `first` to `first + width`. Columns from `size` on are padding."""

    first: int
    width: int
    size: int

    def logprobs(self, logits: Tensor, targets: Tensor) -> Tensor:
        """log softmax over the whole vocabulary at `targets` [N]; `logits` [N, width] float32, result [N]."""
        logits = self.without_padding(logits)
        top = logits.detach().amax(dim=1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tensor_group())
        shifted = logits - top[:, None]
        total = reduce_from_tensor_model_parallel_region(shifted.exp().sum(dim=1), tensor_group())
        return self.chosen(shifted, targets) - total.log()

    def chosen(self, scores: Tensor, targets: Tensor) -> Tensor:
        """`scores` [N, width] at `targets` [N], from the rank that holds each target; [N]."""
        local = targets - self.first
        here = (local >= 0) & (local < self.width)
        found = scores.gather(1, local.clamp(0, self.width - 1)[:, None]).squeeze(1)
        return reduce_from_tensor_model_parallel_region(torch.where(here, found, 0.0), tensor_group())

    def gathered(self, scores: Tensor) -> Tensor:
        """[N, size]: the columns of all ranks, without padding. For sampling only."""
        return gather_from_tensor_model_parallel_region(scores.contiguous(), tensor_group())[..., : self.size]

    def without_padding(self, logits: Tensor) -> Tensor:
        """`logits` with padding columns at minus infinity."""
        real = max(0, self.size - self.first)
        if real >= self.width:
            return logits
        padding = torch.arange(self.width, device=logits.device) >= real
        return logits.masked_fill(padding, -torch.inf)
