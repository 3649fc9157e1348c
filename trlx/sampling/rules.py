"""What is done to logits before a token is drawn, for every sampler; in the order of ``transformers``' generate."""

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
from trlx.sampling.settings import SHAPING, SamplingConfig, check_logits

Make = Callable[[Any, list[int], torch.device], Any]

LOOKING_BACK: dict[str, Make] = {
    "repetition_penalty": lambda value, eos, device: RepetitionPenaltyLogitsProcessor(float(value)),
    "no_repeat_ngram_size": lambda value, eos, device: NoRepeatNGramLogitsProcessor(int(value)),
    "bad_words_ids": lambda value, eos, device: NoBadWordsLogitsProcessor(value, eos or None),
    "suppress_tokens": lambda value, eos, device: SuppressTokensLogitsProcessor(value, device=device),
}
"""Settings whose rule looks at the tokens so far, those of the prompt included."""

NARROWING: dict[str, Make] = {
    "temperature": lambda value, eos, device: TemperatureLogitsWarper(float(value)),
    "top_k": lambda value, eos, device: TopKLogitsWarper(value),
    "top_p": lambda value, eos, device: TopPLogitsWarper(float(value)),
    "min_p": lambda value, eos, device: MinPLogitsWarper(float(value)),
    "typical_p": lambda value, eos, device: TypicalLogitsWarper(float(value)),
    "epsilon_cutoff": lambda value, eos, device: EpsilonLogitsWarper(float(value)),
    "eta_cutoff": lambda value, eos, device: EtaLogitsWarper(float(value), device=device),
}
"""Settings whose rule leaves the likelier tokens, where tokens are drawn at random."""

IDLE: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "temperature": (1.0,),
    "top_k": (0,),
    "top_p": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}
"""Values that change nothing."""

KNOWN = (*SHAPING, *LOOKING_BACK, *(name for name in NARROWING if name not in ("temperature", "top_k", "top_p")))
"""The keys of ``SamplingConfig.extra`` that have a rule here."""


class Rules:
    """The rules of one call of a sampler.

    Args:
        heads: those of the policy; ``beta`` needs "value" and "q".

    Raises:
        ValueError: a value that means nothing.
    """

    def __init__(self, sampling: SamplingConfig, device: torch.device, heads: nn.ModuleDict | None = None):
        self.min_new_tokens = sampling.min_new_tokens
        self.eos = sampling.eos_token_ids
        self.beta, self.heads = sampling.extra.get("beta"), heads
        mask = sampling.extra.get("logit_mask")
        self.forbidden = None if mask is None else torch.as_tensor(mask, dtype=torch.bool, device=device)
        drawn = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
        self.looking_back = _made(LOOKING_BACK, sampling.extra, self.eos, device)
        self.narrowing = _made(NARROWING, drawn | sampling.extra if sampling.do_sample else {}, self.eos, device)

    def __call__(
        self, logits: Tensor, last: Tensor, rows: Callable[[], list[list[int]]], step: int, hidden: Tensor | None
    ) -> Tensor:
        """The logits [B, V] to draw from, of those that the model gives.

        Args:
            last: int64 [B], the last token of each row.
            rows: gives all tokens of each row so far, without padding.
            step: tokens of each response so far.
            hidden: [B, d], the states that the logits come from; only ``beta`` needs them.

        Raises:
            FloatingPointError: see `check_logits`.
        """
        check_logits(logits)
        if self.looking_back:
            logits = self._looked_back(logits, rows())
        if step < self.min_new_tokens and self.eos:
            logits = logits.index_fill(1, torch.tensor(self.eos, device=logits.device), -torch.inf)
        if self.forbidden is not None:
            logits = logits.masked_fill(self.forbidden[last], -torch.inf)
        if self.beta:
            q, values = self.heads["q"].lowest_target(hidden), self.heads["value"](hidden)
            logits = shifted_logits(logits, q.to(logits.device), values.to(logits.device), self.beta)
        return self.narrowing(None, logits)

    def _looked_back(self, logits: Tensor, rows: list[list[int]]) -> Tensor:
        if len(set(map(len, rows))) == 1:
            return self.looking_back(torch.tensor(rows, device=logits.device), logits)
        # row by row, as padding is nothing that was said
        each = zip(rows, logits.split(1), strict=True)
        return torch.cat([self.looking_back(torch.tensor([row], device=logits.device), own) for row, own in each])


def _made(
    table: Mapping[str, Make], settings: Mapping[str, Any], eos: list[int], device: torch.device
) -> LogitsProcessorList:
    return LogitsProcessorList(
        make(settings[name], eos, device)
        for name, make in table.items()
        if settings.get(name) is not None and settings[name] not in IDLE.get(name, ())
    )
