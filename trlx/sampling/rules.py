"""The rules that change logits before a token is drawn, the same for every sampler, in the order of ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from trlx.methods.ilql import shifted_logits
from trlx.sampling.settings import SHAPING, SamplingConfig

Table = Mapping[str, tuple[Any, Callable[[Any, "Rules"], Any]]]
"""For each setting: the value that changes nothing, and what makes the rule from another value."""

LOOKING_BACK: Table = {
    "repetition_penalty": (1.0, lambda value, own: RepetitionPenaltyLogitsProcessor(float(value))),
    "no_repeat_ngram_size": (0, lambda value, own: NoRepeatNGramLogitsProcessor(int(value))),
    "bad_words_ids": (None, lambda value, own: NoBadWordsLogitsProcessor(value, own.eos or None)),
    "suppress_tokens": (None, lambda value, own: SuppressTokensLogitsProcessor(value, device=own.device)),
}
"""Rules that get all tokens of a row so far, the prompt included."""

NARROWING: Table = {
    "temperature": (1.0, lambda value, own: TemperatureLogitsWarper(float(value))),
    "top_k": (0, lambda value, own: TopKLogitsWarper(value, min_tokens_to_keep=own.keep)),
    "top_p": (1.0, lambda value, own: TopPLogitsWarper(float(value), min_tokens_to_keep=own.keep)),
    "min_p": (0.0, lambda value, own: MinPLogitsWarper(float(value), min_tokens_to_keep=own.keep)),
    "typical_p": (1.0, lambda value, own: TypicalLogitsWarper(float(value), min_tokens_to_keep=own.keep)),
    "epsilon_cutoff": (0.0, lambda value, own: EpsilonLogitsWarper(float(value), min_tokens_to_keep=own.keep)),
    "eta_cutoff": (0.0, lambda value, own: EtaLogitsWarper(float(value), -torch.inf, own.keep, own.device)),
}
"""Rules for ``do_sample: true``: they keep the likelier tokens."""

KNOWN = (*SHAPING, *LOOKING_BACK, *NARROWING)
"""The settings that have a rule here."""


class Rules:
    """The rules of one call of a sampler.

    Args:
        heads: the policy's heads; ``beta`` needs "value" and "q".

    Raises:
        ValueError: a setting has a value that its rule does not take.
    """

    def __init__(self, sampling: SamplingConfig, device: torch.device, heads: nn.ModuleDict | None = None):
        self.device, self.heads = device, heads
        self.eos, self.min_new_tokens = sampling.eos_token_ids, sampling.min_new_tokens
        self.ends = torch.tensor(self.eos, dtype=torch.int64, device=device)
        # a beam that ends needs another token to go on with
        self.keep = 1 + max(1, len(self.eos)) if (sampling.extra.get("num_beams") or 1) > 1 else 1
        self.beta, mask = (sampling.extra.get(name) for name in SHAPING)
        self.forbidden = None if mask is None else torch.as_tensor(mask, dtype=torch.bool, device=device)
        self.looking_back = self._made(LOOKING_BACK, sampling)
        self.narrowing = self._made(NARROWING if sampling.do_sample else {}, sampling)
        narrowed = [rule for rule in self.narrowing if not isinstance(rule, TemperatureLogitsWarper)]
        changed = self.looking_back or narrowed or self.beta or mask is not None or (self.min_new_tokens and self.eos)
        self.is_policy = sampling.do_sample and not changed
        """Whether tokens are drawn from softmax(logits / temperature), which is the policy that trains."""

    def __call__(
        self,
        logits: Tensor,
        last: Tensor,
        rows: Callable[[], list[list[int]]],
        steps: int | Tensor,
        hidden: Tensor | None,
    ) -> Tensor:
        """The model's logits [B, V] after all rules.

        Args:
            last: int64 [B], the last token of each row.
            rows: returns all tokens of each row so far, without padding.
            steps: number of response tokens so far, one for all rows or int64 [B].
            hidden: [B, d], the hidden states that gave the logits; only ``beta`` needs them.
        """
        if self.looking_back:
            logits = self._looked_back(logits, rows())
        if self.min_new_tokens and self.eos:
            early = torch.as_tensor(steps < self.min_new_tokens, device=logits.device).view(-1, 1)
            logits = logits.index_copy(1, self.ends, logits[:, self.ends].masked_fill(early, -torch.inf))
        if self.forbidden is not None:
            logits = logits.masked_fill(self.forbidden[last], -torch.inf)
        if self.beta:
            q, values = self.heads["q"].lowest_target(hidden), self.heads["value"](hidden)
            logits = shifted_logits(logits, q.to(logits.device), values.to(logits.device), self.beta)
        return self.narrowing(None, logits)

    def _looked_back(self, logits: Tensor, rows: list[list[int]]) -> Tensor:
        if len(set(map(len, rows))) == 1:
            return self.looking_back(torch.tensor(rows, device=logits.device), logits)
        # rows of other lengths go one by one: padding would count as a token that was said
        each = zip(rows, logits.split(1), strict=True)
        return torch.cat([self.looking_back(torch.tensor([row], device=logits.device), own) for row, own in each])

    def _made(self, table: Table, sampling: SamplingConfig) -> LogitsProcessorList:
        made = LogitsProcessorList()
        for name, (idle, make) in table.items():
            value = sampling.extra[name] if name in sampling.extra else getattr(sampling, name, None)
            if value is None or value == idle:
                continue
            try:
                made.append(make(value, self))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{sampling.where}.{name} is {value!r}: {error}") from error
        return made
