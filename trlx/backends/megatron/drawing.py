"""Draws one token per row from its logits: first logits processors, then warpers, as ``transformers``' generate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trlx.methods.ilql import shifted_logits
from trlx.sampling.settings import SHAPING, SamplingConfig, check_logits

SETTINGS = (*SHAPING, "repetition_penalty", "no_repeat_ngram_size")
"""Supported generation settings besides the fields of `SamplingConfig`."""


def check_settings(sampling: SamplingConfig, has_q: bool, vocabulary: int) -> None:
    """Refuses generation settings that this backend does not support.

    Raises:
        ValueError: a setting is not supported, ``beta`` is given without Q heads, or ``logit_mask`` has another shape.
    """
    for name in sampling.extra:
        if name not in SETTINGS:
            raise ValueError(
                f"{sampling.where}.{name} does not work with a NeMo trainer, which knows {', '.join(SETTINGS)}"
            )
    sampling.check_shaping(has_q, vocabulary)


class Drawing:
    """Draws the tokens of one group of rows, step by step.

    Args:
        uniforms: float64 [B, max_new_tokens] in [0, 1): one random number per row and step.
    """

    def __init__(self, sampling: SamplingConfig, prompts: list[list[int]], uniforms: Tensor):
        self.sampling = sampling
        self.uniforms = uniforms
        self.rows = [list(prompt) for prompt in prompts]
        self.starts = [len(prompt) for prompt in prompts]
        self.done = [False] * len(prompts)
        mask = sampling.extra.get("logit_mask")
        device = uniforms.device
        self.forbidden = None if mask is None else torch.as_tensor(mask, dtype=torch.bool, device=device)
        self.warpers = _warpers(sampling)

    def draw(self, logits: Tensor, hidden: Tensor, heads: nn.ModuleDict | None) -> Tensor:
        """int64 [3, B]: the next token of each row, whether the row was done before it, and after it.

        `logits` [B, V] float32 and `hidden` [B, d] are those of the last column. ILQL's shift needs `heads`.

        Raises:
            FloatingPointError: see `check_logits`.
        """
        check_logits(logits)
        before = list(self.done)
        chosen = self._choose(self._shaped(logits, hidden, heads))
        for row, (token, done) in enumerate(zip(chosen.tolist(), before, strict=True)):
            self._append(row, self.sampling.pad_token_id if done else token)
        return torch.stack([self._last(), torch.tensor(before), torch.tensor(self.done)]).to(logits.device)

    def _append(self, row: int, token: int) -> None:
        ids, stop = self.rows[row], self.sampling.stop
        ids.append(token)
        ended = token in self.sampling.eos_token_ids or (stop is not None and stop.done(ids[self.starts[row] :]))
        self.done[row] = self.done[row] or ended

    def _last(self) -> Tensor:
        return torch.tensor([row[-1] for row in self.rows])

    def _shaped(self, logits: Tensor, hidden: Tensor, heads: nn.ModuleDict | None) -> Tensor:
        logits = self._processed(logits)
        if self.forbidden is not None:
            logits = logits.masked_fill(self.forbidden[self._last().to(logits.device)], -torch.inf)
        beta = self.sampling.extra.get("beta")
        if beta:
            logits = shifted_logits(logits, heads["q"].lowest_target(hidden), heads["value"](hidden), beta)
        return logits

    def _processed(self, logits: Tensor) -> Tensor:
        """Processors run row by row, because they read the tokens so far and rows have different lengths."""
        each = _processors(self.sampling, logits.device)
        if not each:
            return logits
        processed = []
        for row, ids in enumerate(self.rows):
            seen = torch.tensor([ids], device=logits.device)
            processed.append(each(self.starts[row])(seen, logits[row : row + 1]))
        return torch.cat(processed)

    def _choose(self, logits: Tensor) -> Tensor:
        if not self.sampling.do_sample:
            return logits.argmax(dim=-1)
        probabilities = self.warpers(None, logits).double().softmax(dim=-1)
        if probabilities.isnan().any():
            raise ValueError("No token can be drawn: the logits are NaN, or logit_mask forbids every token")
        step = len(self.rows[0]) - self.starts[0]
        # the first token whose cumulative probability exceeds the row's number, scaled by their sum against rounding
        reached = probabilities.cumsum(dim=-1)
        wanted = self.uniforms[:, step : step + 1] * reached[:, -1:]
        return (reached > wanted).int().argmax(dim=-1)


def _warpers(sampling: SamplingConfig) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _processors(sampling: SamplingConfig, device: torch.device) -> Any:
    """From the length of a prompt to the processors of its row; None: no processors."""
    fixed = LogitsProcessorList()
    if sampling.extra.get("repetition_penalty", 1.0) != 1.0:
        fixed.append(RepetitionPenaltyLogitsProcessor(float(sampling.extra["repetition_penalty"])))
    if sampling.extra.get("no_repeat_ngram_size"):
        fixed.append(NoRepeatNGramLogitsProcessor(int(sampling.extra["no_repeat_ngram_size"])))
    shortest = sampling.min_new_tokens if sampling.eos_token_ids else 0
    if not fixed and not shortest:
        return None

    def of_row(start: int) -> LogitsProcessorList:
        if not shortest:
            return fixed
        return LogitsProcessorList(
            [*fixed, MinNewTokensLengthLogitsProcessor(start, shortest, sampling.eos_token_ids, device=device)]
        )

    return of_row
