"""The rows that an epoch trains on, their order, and each process's share of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from trlx.batch import Rollout, TokenBatch
from trlx.data.collate import RowFormat


class RolloutStore:
    """Rollouts that become tensors when a batch is read, so that its longest row gives its width."""

    def __init__(self, rollouts: Sequence[Rollout], pad_id: int, row_format: RowFormat | None = None):
        self.rollouts = list(rollouts)
        self.pad_id = pad_id
        self.row_format = row_format or RowFormat()

    def __len__(self) -> int:
        return len(self.rollouts)

    def rows(self, index) -> TokenBatch:
        """The rows at `index` (slice, list of int, int64 or bool tensor), collated."""
        return self.row_format.collate([self.rollouts[i] for i in torch.arange(len(self))[index].tolist()], self.pad_id)

    def num_tokens(self, index: list[int]) -> int:
        """The number of tokens in the prompts and responses of these rows."""
        return sum(len(self.rollouts[i].prompt) + len(self.rollouts[i].response) for i in index)

    def digest(self) -> str:
        """A short hash of tokens and scores. If a resumed run has another one, its data changed."""
        rows = "".join(f"{r.prompt}{r.response}{r.trained}{r.score}" for r in self.rollouts)
        return hashlib.sha256(rows.encode()).hexdigest()[:16]


Store = TokenBatch | RolloutStore
"""Rows to train on: `len()`, `rows(index)` and `num_tokens(index)`."""


def pass_order(num_rows: int, seed: int, number: int, together: int = 1) -> tuple[int, ...]:
    """The order of rows in the `number`-th pass over a store. It depends on the arguments alone, so no state is saved.

    Args:
        together: blocks of this many consecutive rows stay together and in order.

    Raises:
        ValueError: the rows are not a multiple of `together`.
    """
    if num_rows % together:
        raise ValueError(f"There are {num_rows} rows, but {together} stay together: give a multiple of {together}")
    blocks = permutation(num_rows // together, seed, "rows", number)
    return blocks if together == 1 else tuple(block * together + row for block in blocks for row in range(together))


@lru_cache(maxsize=2)  # one for prompts and one for rows; each is read to its end before the next
def permutation(size: int, seed: int, stream: str, number: int) -> tuple[int, ...]:
    """The `number`-th shuffled order of ``range(size)`` for `seed` and `stream`; no global random state is used."""
    # a generator reads only 32 bits of its seed; the hash gives neighbouring seeds and numbers different ones
    digest = hashlib.sha256(f"{seed} {stream} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return tuple(torch.randperm(size, generator=generator).tolist())


def own_rows(count: int, rank: int, size: int, together: int = 1) -> slice:
    """The slice of `rank` among `count` rows in blocks of `together`. All have one length; the last may be too long."""
    share = -(-count // (size * together)) * together
    return slice(rank * share, (rank + 1) * share)


def shard(store: Store, indices: list[int], rank: int, size: int, together: int = 1) -> TokenBatch:
    """The share of process `rank` of a global batch, see `own_rows`.

    Every process gets the same number of rows. Copies of the first row fill up a short share; their ``response_mask``
    is False everywhere, so they do not count.
    """
    rows = own_rows(len(indices), rank, size, together)
    mine = indices[rows]
    missing = rows.stop - rows.start - len(mine)
    batch = store.rows(mine + indices[:1] * missing)
    response_mask = batch.response_mask.clone()
    response_mask[len(mine) :] = False
    return batch.replace(response_mask=response_mask)
