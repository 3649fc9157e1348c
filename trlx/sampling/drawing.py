"""Draws one token per row from its logits, with random numbers that depend on the row and the step alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trlx.batch import Sample
from trlx.sampling.rules import Rules
from trlx.sampling.settings import SamplingConfig, check_logits

HELD = 0.9
"""Rows that have ended leave their batch when less than this share of it goes on: to drop them copies the cache."""


def uniforms(seed: int, rows: int, steps: int) -> Tensor:
    """float64 [rows, steps] in [0, 1). More rows do not change the numbers of those before them."""
    return torch.rand(rows, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equal_prompts(prompts: list[list[int]]) -> list[list[int]]:
    """The rows of each prompt; the longest prompts come first."""
    equal: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        equal.setdefault(tuple(prompt), []).append(row)
    return [equal[prompt] for prompt in sorted(equal, key=len, reverse=True)]


class Drawing:
    """Draws the tokens of one group of rows, step by step.

    Args:
        uniforms: float64 [B, max_new_tokens] in [0, 1): one random number per row and step.
        heads: those of the policy; only ILQL's shift needs them.
    """

    def __init__(
        self, sampling: SamplingConfig, prompts: list[list[int]], uniforms: Tensor, heads: nn.ModuleDict | None = None
    ):
        self.sampling, self.ends = sampling, sampling.eos_token_ids
        self.uniforms = uniforms
        self.rules = Rules(sampling, uniforms.device, heads)
        self.rows = [list(prompt) for prompt in prompts]
        self.starts = [len(prompt) for prompt in prompts]
        self.done = [False] * len(prompts)
        self.said: list[list[list[float]]] = [[] for _ in prompts]
        """For each row and token, its log-probability, and the value of the state before it if values were given."""
        self.hold(list(range(len(prompts))))

    def hold(self, rows: list[int]) -> None:
        """From now on `draw` gets and gives only these rows, in this order."""
        self.held = rows
        self.numbers = self.uniforms[torch.tensor(rows, dtype=torch.int64, device=self.uniforms.device)]
        counts, last = [len(self.said[row]) for row in rows], [self.rows[row][-1] for row in rows]
        # on the device from now on: to copy them there would wait for the model
        self.steps, self.last = torch.tensor([counts, last], dtype=torch.int64, device=self.uniforms.device)

    def draw(self, logits: Tensor, hidden: Tensor, values: Tensor | None = None) -> Tensor:
        """int64 [3, B]: the next token of each row, whether the row was done before it, and after it.

        `logits` [B, V] float32, `hidden` [B, d] and `values` [B] are those of the last column.

        Raises:
            FloatingPointError: see `check_logits`.
            ValueError: the rules leave a row no token.
        """
        before = [self.done[row] for row in self.held]
        shaped = self.rules(logits, self.last, lambda: [self.rows[i] for i in self.held], self.steps, hidden)
        tokens, logprobs = self._choose(shaped)
        checked = logprobs if self.sampling.do_sample else logits.amax(dim=-1)
        # one copy from the device, which waits for it
        columns = (tokens, checked, logprobs, *([] if values is None else [values]))
        drawn, finite, *said = torch.stack([column.double() for column in columns]).tolist()
        if not all(done or math.isfinite(number) for done, number in zip(before, finite, strict=True)):
            check_logits(logits)
            raise ValueError("No token can be drawn: logit_mask forbids every token")
        for row, token, *numbers in zip(self.held, map(int, drawn), *said, strict=True):
            self._append(row, token, numbers)
        drawn = [[self.rows[row][-1] for row in self.held], before, [self.done[row] for row in self.held]]
        result = torch.tensor(drawn, device=logits.device)
        self.steps, self.last = self.steps + 1, result[0]
        return result

    def is_full(self, row: int) -> bool:
        """Whether the row has as many tokens as it may have."""
        return len(self.said[row]) == self.sampling.max_new_tokens

    def sample(self, row: int, version: int) -> Sample:
        """What a row has drawn; with its numbers where the policy was not changed by a rule."""
        ids = self.rows[row][self.starts[row] :][: len(self.said[row])]
        numbers = map(list, zip(*self.said[row], strict=True)) if self.rules.is_policy else ()
        return Sample(ids, **dict(zip(("logprobs", "values"), numbers, strict=False)), version=version)

    def _append(self, row: int, token: int, numbers: list[float]) -> None:
        ids, stop = self.rows[row], self.sampling.stop
        if self.done[row]:
            ids.append(self.sampling.pad_token_id)
            return
        ids.append(token)
        self.said[row].append(numbers)
        self.done[row] = token in self.ends or (stop is not None and stop.done(ids, self.starts[row]))

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens [B], their log-probabilities [B]) from logits [B, V]."""
        if not self.sampling.do_sample:
            return logits.argmax(dim=-1), torch.zeros(len(logits), device=logits.device)
        probabilities = logits.softmax(dim=-1, dtype=torch.float64)
        # the first token whose cumulative probability exceeds the row's number, scaled by their sum against rounding
        reached = probabilities.cumsum(dim=-1)
        wanted = self.numbers.gather(1, self.steps[:, None]) * reached[:, -1:]
        tokens = torch.searchsorted(reached, wanted, right=True).clamp(max=logits.shape[-1] - 1)
        return tokens.squeeze(1), probabilities.gather(1, tokens).log().squeeze(1)
