"""Draws one token per row from its logits, with random numbers that do not depend on how the model is divided."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trlx.sampling.rules import Rules
from trlx.sampling.settings import SamplingConfig


class Drawing:
    """Draws the tokens of one group of rows, step by step.

    Args:
        uniforms: float64 [B, max_new_tokens] in [0, 1): one random number per row and step.
        heads: those of the policy; only ILQL's shift needs them.
    """

    def __init__(
        self, sampling: SamplingConfig, prompts: list[list[int]], uniforms: Tensor, heads: nn.ModuleDict | None = None
    ):
        self.sampling = sampling
        self.uniforms = uniforms
        self.rules = Rules(sampling, uniforms.device, heads)
        self.rows = [list(prompt) for prompt in prompts]
        self.starts = [len(prompt) for prompt in prompts]
        self.done = [False] * len(prompts)

    def draw(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """int64 [3, B]: the next token of each row, whether the row was done before it, and after it.

        `logits` [B, V] float32 and `hidden` [B, d] are those of the last column.

        Raises:
            FloatingPointError: see `check_logits`.
        """
        before = list(self.done)
        step = len(self.rows[0]) - self.starts[0]
        last = self._last().to(logits.device)
        chosen = self._choose(self.rules(logits, last, lambda: self.rows, step, hidden), step)
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

    def _choose(self, logits: Tensor, step: int) -> Tensor:
        if not self.sampling.do_sample:
            return logits.argmax(dim=-1)
        probabilities = logits.double().softmax(dim=-1)
        if probabilities.isnan().any():
            raise ValueError("No token can be drawn: the logits are NaN, or logit_mask forbids every token")
        # the first token whose cumulative probability exceeds the row's number, scaled by their sum against rounding
        reached = probabilities.cumsum(dim=-1)
        wanted = self.uniforms[:, step : step + 1] * reached[:, -1:]
        return (reached > wanted).int().argmax(dim=-1)
