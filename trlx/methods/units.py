"""What a loss is a mean of."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from trlx.batch import TokenBatch


class Unit(Enum):
    """A loss returns a sum over these; the backend divides it by their number in the whole global batch."""

    TOKEN = "response token"
    SEQUENCE = "sequence"
    PAIR = "pair"

    @property
    def rows(self) -> int:
        """Consecutive rows that make up one unit; they always stand in one microbatch."""
        return 2 if self is Unit.PAIR else 1

    def count(self, batch: TokenBatch) -> Tensor:
        """How many units a batch has, a 0-d tensor. Rows without a response token fill a batch up and do not count."""
        if self is Unit.TOKEN:
            return batch.response_mask.sum()
        return batch.response_mask.any(dim=1).view(-1, self.rows).all(dim=1).sum()
