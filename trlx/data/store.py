"""What an epoch trains on, the order it is read in, and each process's part of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch

from trlx.batch import Rollout, TokenBatch
from trlx.data.collate import DecoderRows, RowFormat


class Store(Protocol):
    """Rows to train on. A `TokenBatch` is one itself."""

    def __len__(self) -> int:
        """The number of rows."""

    def rows(self, index) -> TokenBatch:
        """The rows at `index` (slice, list of int, int64 or bool tensor), no wider than they need."""

    def num_tokens(self, index: list[int]) -> int:
        """How many tokens the prompts and responses of some rows have."""


class RolloutStore:
    """Rollouts that stay lists until a batch of them is asked for, so that no batch is wider than its longest row."""

    def __init__(self, rollouts: Sequence[Rollout], pad_id: int, row_format: RowFormat | None = None):
        self.rollouts = list(rollouts)
        self.pad_id = pad_id
        self.row_format = row_format or DecoderRows()

    def __len__(self) -> int:
        return len(self.rollouts)

    def rows(self, index) -> TokenBatch:
        """The rows at `index` (slice, list of int, int64 or bool tensor), collated."""
        return self.row_format.collate([self.rollouts[i] for i in torch.arange(len(self))[index].tolist()], self.pad_id)

    def num_tokens(self, index: list[int]) -> int:
        """How many tokens the prompts and responses of some rows have."""
        return sum(len(self.rollouts[i].prompt) + len(self.rollouts[i].response) for i in index)

    def digest(self) -> str:
        """A short hash of tokens and scores, to recognise other data when a run is resumed."""
        digest = hashlib.sha256()
        for rollout in self.rollouts:
            digest.update(f"{rollout.prompt}{rollout.response}{rollout.trained}{rollout.score}".encode())
        return digest.hexdigest()[:16]


def pass_order(num_rows: int, seed: int, number: int, together: int = 1) -> tuple[int, ...]:
    """The row numbers of the `number`-th pass over a store: a function of its arguments, so a resume needs none of it
    saved. Global batches are consecutive pieces of it; the last one may be short.

    Args:
        together: blocks of so many rows keep their order inside, and stay neighbours.
    """
    blocks = permutation(num_rows // together, seed, "rows", number)
    return blocks if together == 1 else tuple(block * together + row for block in blocks for row in range(together))


@lru_cache(maxsize=2)  # one of prompts and one of rows, each read from end to end
def permutation(size: int, seed: int, stream: str, number: int) -> tuple[int, ...]:
    """The `number`-th shuffled order of ``range(size)`` under `seed`; touches no global random state.

    Args:
        stream: what is ordered, e.g. ``"prompts"``: another thing of the same size gets another order.
    """
    # the generator sees 32 bits only, and neighbouring seeds and numbers must be apart within them
    digest = hashlib.sha256(f"{seed} {stream} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return tuple(torch.randperm(size, generator=generator).tolist())


def own_rows(count: int, rank: int, size: int, together: int = 1) -> slice:
    """Process `rank`'s consecutive share of `count` rows, when `size` processes share them in blocks of `together`: all
    shares are equal but the last ones, which may be short."""
    share = -(-count // (size * together)) * together
    return slice(rank * share, (rank + 1) * share)


def shard(store: Store, indices: list[int], rank: int, size: int, together: int = 1) -> TokenBatch:
    """Process `rank`'s consecutive share of a global batch, see `own_rows`.

    Every process gets the same number of rows: what is missing are copies of the first row with ``response_mask`` False
    everywhere, which count nothing.
    """
    rows = own_rows(len(indices), rank, size, together)
    mine = indices[rows]
    missing = rows.stop - rows.start - len(mine)
    batch = store.rows(mine + indices[:1] * missing)
    if not missing:
        return batch
    response_mask = batch.response_mask.clone()
    response_mask[len(mine) :] = False
    return batch.replace(response_mask=response_mask)
