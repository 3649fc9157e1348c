"""What is done to logits before a token is drawn: tokens that may not follow, and ILQL's shift towards a high Q."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from trlx.methods.ilql import shifted_logits
from trlx.models.decoder import output_head, state_givers
from trlx.models.policy import Policy


@contextmanager
def shaping(policy: Policy, beta: float | None = None, logit_mask: Any = None) -> Iterator[LogitsProcessorList]:
    """Processors for ``generate``, which calls them before temperature and top-k; they work inside the block only.

    Args:
        beta: sample from log pi(a) + beta (min target Q(a) - V), see ``shifted_logits``; None or 0: from pi.
        logit_mask: bool [V, V], or what becomes one; True where token column must not follow token row.

    Both have been checked (see ``SamplingConfig.check_shaping``).
    """
    processors = LogitsProcessorList()
    if logit_mask is not None:
        device = output_head(policy.model).weight.device
        processors.append(_Forbidden(torch.as_tensor(logit_mask, dtype=torch.bool, device=device)))
    if not beta:
        yield processors
        return
    shift = _AdvantageShift(policy, beta)
    with shift.watching():
        yield LogitsProcessorList([*processors, shift])


class _Forbidden(LogitsProcessor):
    """Takes away the tokens that may not follow each row's last one."""

    def __init__(self, forbidden: Tensor):
        self.forbidden = forbidden

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.forbidden[input_ids[:, -1]], -torch.inf)


class _AdvantageShift(LogitsProcessor):
    """Adds beta (min target Q - V) of every next token, from the hidden states the logits come from."""

    def __init__(self, policy: Policy, beta: float):
        self.policy = policy
        self.beta = beta
        self.states: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        # the trunk's output is what the heads are trained on, whatever a model does between it and its output head
        hooks = [module.register_forward_hook(self._note) for module in state_givers(self.policy.model)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        q, values = self.policy.q_heads.lowest_target(self.states), self.policy.value_head(self.states)
        return shifted_logits(scores, q.to(scores.device), values.to(scores.device), self.beta)

    def _note(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.states = output[0][:, -1]
