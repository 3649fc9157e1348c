"""Log-probabilities of chosen tokens, without the logits of a whole batch in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from trlx.models.architecture import Architecture, Causal
from trlx.models.decoder import output_head, probing

CHUNK_ELEMENTS = 2**26
"""The most logits in memory at once: 256 MB in float32."""


def chosen_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """log softmax(head(hidden) / temperature) at `targets`, in float32.

    `hidden` [N, d] float, `targets` [N] int64, result [N]; `head` maps [n, d] to [n, V]. At most `chunk_elements`
    logits exist at once: longer inputs go in chunks, which the backward pass computes again.
    """
    return in_chunks(partial(_logprobs, head=head, temperature=temperature), hidden, targets, head, chunk_elements)


def in_chunks(
    fn: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """``fn(hidden, targets)`` [..., N] in chunks of rows with at most `chunk_elements` logits; `fn` applies `head`."""
    rows = max(1, chunk_elements // head(hidden[:0]).shape[-1])
    if len(targets) <= rows:
        return fn(hidden, targets)
    again = partial(checkpoint, fn, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*chunk) for chunk in zip(hidden.split(rows), targets.split(rows), strict=True)], dim=-1)


class Chosen(torch.autograd.Function):
    """(`logits` [N, V] at `targets` [N], log softmax(logits) there), both [N]. The probabilities take the memory of the
    logits, and the gradient that of the probabilities: ``F.cross_entropy`` would hold all three at once."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        at, highest = targets[:, None], logits.amax(dim=1, keepdim=True)
        chosen = logits.gather(1, at)
        logits -= highest
        sums = logits.exp_().sum(dim=1, keepdim=True)
        ctx.save_for_backward(logits, sums, at)
        return chosen.squeeze(1), (chosen - highest - sums.log()).squeeze(1)

    @staticmethod
    def backward(ctx, of_logits: Tensor, of_logprobs: Tensor) -> tuple[Tensor, None]:
        exponentials, sums, at = ctx.saved_tensors
        exponentials *= -of_logprobs[:, None] / sums
        return exponentials.scatter_add_(1, at, (of_logits + of_logprobs)[:, None]), None


def spread(flat: Tensor, at: Tensor, shape: torch.Size) -> Tensor:
    """Zeros [..., B, T] with `flat` [..., N] at the places `at` [N], which count through the rows of `shape` [B, T]."""
    lead = flat.shape[:-1]
    return flat.new_zeros(*lead, shape.numel()).index_copy(-1, at, flat).view(*lead, *shape)


@dataclass(frozen=True)
class Logits:
    """Maps hidden states [..., d] to logits [..., V]: the output head, then the model's scale, bias and soft cap."""

    head: nn.Module
    scale: float = 1.0
    cap: float | None = None
    biased: nn.Module | None = None
    """The module whose buffer ``final_logits_bias`` is added (BART, Marian)."""

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.biased is not None:
            logits = logits + self.biased.final_logits_bias
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def logits_of(model: PreTrainedModel, architecture: Architecture | None = None) -> Logits:
    """The map from hidden states to logits, checked once against the model's own logits.

    In the check the trunk gets one token less than the model: equal logits also show that the model is causal, so that
    a hidden state does not depend on later tokens, padding included.

    Raises:
        ValueError: the model computes its logits in another way, or is not causal.
    """
    architecture = architecture or Causal(model)
    with probing(model) as tokens:
        expected = architecture.whole_logits(tokens)[:, :-1].float()
        hidden = architecture.states(tokens[:, :-1], tokens, torch.ones_like(tokens))
        tolerance = torch.finfo(hidden.dtype).eps ** 0.5 * expected.abs().max()
        for logits in _candidates(model):
            found = logits(hidden).float()
            if found.shape == expected.shape and (found - expected).abs().max() <= tolerance:
                return logits
    raise ValueError(
        f"{type(model).__name__} is not supported: its logits are not its output head applied to the hidden states of "
        f"the tokens so far, with T5's scale, or a scale ({', '.join(_SCALES)}) or a soft cap ({', '.join(_CAPS)}) "
        "from its config."
    )


_SCALES = ("logit_scale", "lm_head_multiplier", "logits_scaling")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def _candidates(model: PreTrainedModel) -> list[Logits]:
    config = model.config.get_text_config()
    head, cap = output_head(model), _number(config, _CAPS)
    if head is getattr(model, "score", None):
        return [Logits(head)]
    biased = model if hasattr(model, "final_logits_bias") else None
    scale = _number(config, _SCALES)
    # one name multiplies in HyperCLOVA X, divides in Granite and does nothing in MPT: the check decides
    named = (scale, 1 / scale) if scale is not None else ()
    # T5 with tied embeddings scales the input of its output head by d ** -0.5
    return [Logits(head, by, cap, biased) for by in (*named, 1.0, head.weight.shape[1] ** -0.5)]


def _number(config: PretrainedConfig, names: tuple[str, ...]) -> float | None:
    found = [getattr(config, name, None) for name in names]
    return next((float(value) for value in found if isinstance(value, (int, float)) and value != 0), None)


def _logprobs(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], temperature: float) -> Tensor:
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    return Chosen.apply(logits, targets)[1]
