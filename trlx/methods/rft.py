"""Rejection fine-tuning (arXiv:2308.01825) with a rising threshold (arXiv:2308.08998)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

_MARGIN = 1e-3


def select(
    prompts: Sequence[Hashable], outputs: Sequence[Hashable], scores: Sequence[float], percentile: float
) -> list[int]:
    """Indices, in order, of samples whose score reaches their prompt's threshold; only the first of equal samples.

    The three lists have one entry per sample; prompts and outputs are texts, or tuples of ids.
    """
    threshold = thresholds(prompts, scores, percentile)
    chosen: dict[tuple[Hashable, Hashable], int] = {}
    for i, (prompt, output, score) in enumerate(zip(prompts, outputs, scores, strict=True)):
        if score >= threshold[prompt]:
            chosen.setdefault((prompt, output), i)
    return list(chosen.values())


def thresholds(prompts: Sequence[Hashable], scores: Sequence[float], percentile: float) -> dict[Hashable, float]:
    """For each prompt, the quantile of its own scores (linear interpolation), repeated samples included.

    Quantiles are then clipped to [lowest + 0.001, highest − 0.001] of all prompts' quantiles. This matters for rewards
    with few levels: samples of prompts at the lowest level are not selected, and those at the highest level are. Where
    the two bounds cross, as with a single prompt, the upper bound is used.
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
    """Percentile of improvement step `step`: `n_improve_steps` equal steps from `start` towards `end`, then again.

    start + (end − start) / n · (step mod n), so the last step of a round is one step short of `end`.
    """
    return start + (end - start) / n_improve_steps * (step % n_improve_steps)
