"""Rejection fine-tuning (arXiv:2308.01825) with a rising threshold (arXiv:2308.08998): learn from one's best."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

_MARGIN = 1e-3


def select(
    prompts: Sequence[Hashable], outputs: Sequence[Hashable], scores: Sequence[float], percentile: float
) -> list[int]:
    """Indices, in order, of samples that score at least their prompt's threshold; of equal samples only the first.

    The three lists have one entry per sample; prompts and outputs are text, or tuples of ids.
    """
    threshold = thresholds(prompts, scores, percentile)
    chosen: dict[tuple[Hashable, Hashable], int] = {}
    for i, (prompt, output, score) in enumerate(zip(prompts, outputs, scores, strict=True)):
        if score >= threshold[prompt]:
            chosen.setdefault((prompt, output), i)
    return list(chosen.values())


def thresholds(prompts: Sequence[Hashable], scores: Sequence[float], percentile: float) -> dict[Hashable, float]:
    """For each prompt, the quantile of its own scores (linear between two), repeated samples included.

    Quantiles are then brought between the lowest + 0.001 and the highest − 0.001 of all prompts. This is for rewards of
    few levels: prompts stuck at the lowest level give nothing, and those at the highest keep what reaches it. Where the
    two bounds cross, as with a single prompt, the upper one holds.
    """
    by_prompt: dict[Hashable, list[float]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        by_prompt.setdefault(prompt, []).append(score)
    quantiles = {
        prompt: float(torch.tensor(own, dtype=torch.float64).quantile(percentile)) for prompt, own in by_prompt.items()
    }
    lowest, highest = min(quantiles.values(), default=0.0) + _MARGIN, max(quantiles.values(), default=0.0) - _MARGIN
    return {prompt: min(max(quantile, lowest), highest) for prompt, quantile in quantiles.items()}


def percentile_at(step: int, start: float, end: float, n_improve_steps: int) -> float:
    """Percentile of improvement step `step`: from `start` in `n_improve_steps` equal steps towards `end`, then anew.

    start + (end − start) / n · (step mod n), so the last step of a round is one step short of `end`.
    """
    return start + (end - start) / n_improve_steps * (step % n_improve_steps)
