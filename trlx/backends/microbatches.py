"""Cuts the rows of a batch into microbatches of rows of about one length, so that little of them is padding."""

from __future__ import annotations

import torch

from trlx.batch import TokenBatch

PASS_COST = {"cpu": 64}
"""By kind of device: a pass costs about as much as this many tokens more than it has."""
FEWEST = 1e9
"""A `pass_cost` with which there are as few microbatches as `most_rows` and `most_tokens` allow."""


def pass_cost(device: torch.device | str) -> float:
    """The `pass_cost` of a device. One for a GPU is a guess from the time of its kernel launches."""
    return PASS_COST.get(torch.device(device).type, 1024)


def row_lengths(batch: TokenBatch) -> list[int]:
    """The number of tokens of each row, for the encoder and the decoder together."""
    masks = [mask for mask in (batch.attention_mask, batch.encoder_mask) if mask is not None]
    return sum(mask.sum(dim=1) for mask in masks).tolist()


def microbatches(
    lengths: list[int], most_rows: int, pass_cost: float, together: int = 1, most_tokens: int | None = None
) -> list[list[int]]:
    """The row numbers of each microbatch, longest rows first, at the lowest cost.

    A microbatch costs its number of rows times its longest row, plus `pass_cost`.

    Args:
        lengths: tokens of each row.
        most_rows: the most rows of a microbatch; a multiple of `together`.
        together: blocks of this many consecutive rows are not split.
        most_tokens: the most tokens of a microbatch, padding included. A block that alone has more is one microbatch.
    """
    widths = [max(lengths[start : start + together]) * together for start in range(0, len(lengths), together)]
    order = sorted(range(len(widths)), key=lambda block: -widths[block])
    # costs[i]: of the blocks from the i-th longest on; ends[i]: where the first of their microbatches ends
    costs, ends = [0.0] * (len(order) + 1), [0] * len(order)
    for start in reversed(range(len(order))):
        width = widths[order[start]]
        fit = most_rows // together if most_tokens is None else min(most_rows // together, most_tokens // width)
        found = range(min(start + max(fit, 1), len(order)), start, -1)
        costs[start], ends[start] = min(
            ((pass_cost + width * (end - start) + costs[end], end) for end in found), key=lambda option: option[0]
        )
    cut, start = [], 0
    while start < len(order):
        blocks = sorted(order[start : ends[start]])
        cut.append([block * together + row for block in blocks for row in range(together)])
        start = ends[start]
    return cut


def filled(lengths: list[int], most_rows: int, together: int = 1, most_tokens: int | None = None) -> list[list[int]]:
    """The row numbers of each microbatch of rows that need no padding: in order, each with as many as it may have.

    Arguments as in `microbatches`.
    """
    cut, tokens = [], 0
    for start in range(0, len(lengths), together):
        rows = range(start, start + together)
        tokens += sum(lengths[start : start + together])
        if cut and len(cut[-1]) < most_rows and (most_tokens is None or tokens <= most_tokens):
            cut[-1] += rows
        else:
            cut.append([*rows])
            tokens = sum(lengths[start : start + together])
    return cut


def at_least(count: int, found: list[list[int]], together: int = 1) -> list[list[int]]:
    """The microbatches `found`, the largest of them halved until there are `count`."""
    found = list(found)
    while len(found) < count:
        largest = max(range(len(found)), key=lambda index: len(found[index]))
        rows = found[largest]
        half = len(rows) // together // 2 * together
        found[largest : largest + 1] = [rows[:half], rows[half:]]
    return found
