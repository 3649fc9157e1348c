"""What a loss is a mean over."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from trlx.batch import TokenBatch


class Unit(Enum):
    """A loss returns a sum over units; the backend divides it by the number of units in the whole global batch."""

    TOKEN = "response token"
    SEQUENCE = "sequence"
    PAIR = "pair"

    @property
    def rows(self) -> int:
        """Consecutive rows that make up one unit; they are always in one microbatch."""
        return 2 if self is Unit.PAIR else 1

    def count(self, batch: TokenBatch) -> Tensor:
        """The number of units in a batch, a 0-d tensor. Rows without a response token are padding and do not count."""
        if self is Unit.TOKEN:
            return batch.response_mask.sum()
        return batch.response_mask.any(dim=1).view(-1, self.rows).all(dim=1).sum()
