"""The data that flows through the library: shape, dtype and meaning of every tensor.

One alignment rule holds everywhere. Rows are whole sequences, right-padded, and entry ``[b, t]`` of every
per-token tensor is about ``tokens[b, t]``: ``logprobs[b, t]`` is the log-probability of token t given the tokens
before it, ``values[b, t]`` is the value of the state just before token t was chosen. Entry 0 is 0.

Shapes: B rows, T tokens, H heads. A mask is True where a token counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Sample:
    """One response as a sampler drew it. Example: ``Sample([3, 4], logprobs=[-0.5, -1.0], version=7)``."""

    ids: list[int]
    """Token ids as drawn: up to and including the first eos, no padding, stop sequences not yet cut off."""
    logprobs: list[float] | None = None
    """Log-probability of each id in the distribution that it was drawn from; None where the sampler does not know."""
    version: int = 0
    """The optimizer step after which the weights had the values that drew it."""
    values: list[float] | None = None
    """The value of the state before each id was drawn, where the sampler has a value head."""


@dataclass(slots=True)
class Rollout:
    """One sequence before padding: prompt, response and score.

    Example: ``Rollout(prompt=[7, 8], response=[3, 4], score=5.0)``.
    """

    prompt: list[int]
    response: list[int]
    """Token ids exactly as sampled (or as tokenized once); never decoded and tokenized again."""
    score: float | list[float] = 0.0
    """One number for the whole response, or one per response token (missing ones at the end count 0)."""
    parts: dict[str, float] = field(default_factory=dict)
    """The named parts that the score is the weighted sum of, before weights; empty if reward_fn names none."""
    trained: list[bool] | None = None
    """For each response token, whether the model chose it; None: all. False for later user turns of a dialogue."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The keys of the caller's prompt dict other than ``"prompt"``."""
    messages: list[Any] | None = None
    """The chat that the prompt was written as; None if it was not a chat."""
    ended: bool = False
    """Whether sampling ended by eos or a stop sequence, not at max_new_tokens."""
    group: int = 0
    """Rollouts that are compared with each other have the same number."""
    logprobs: list[float] | None = None
    """The sampler's log-probabilities of the tokens it drew: an eos that replaces a stop sequence has none."""
    version: int = 0
    """See `Sample`."""
    values: list[float] | None = None
    """The sampler's values of the states before the tokens it drew."""
    ref_logprobs: list[float] | None = None
    """Log-probabilities of the response tokens under the frozen reference policy, where a method keeps them."""


@dataclass(slots=True)
class TokenBatch:
    """A padded batch, or a whole collection of rollouts. All tensors [B, T] unless said otherwise."""

    tokens: Tensor
    """int64. Prompt, response, then padding. For encoder-decoder models: decoder tokens."""
    attention_mask: Tensor
    """bool. True on real tokens; made from lengths, never by comparing ids, so pad may equal eos."""
    response_mask: Tensor
    """bool. True on the tokens the model chose and is trained on."""
    scores: Tensor
    """float32. A scalar score stands at the last response token; a dense one at its tokens; 0 elsewhere."""

    old_logprobs: Tensor | None = None
    """float32. Log-probabilities under the policy that collected the batch."""
    ref_logprobs: Tensor | None = None
    """float32. Log-probabilities under the frozen reference policy."""
    old_values: Tensor | None = None
    """float32. Values at collection."""
    advantages: Tensor | None = None
    """float32. Whitened over the collection; constants for the loss."""
    returns: Tensor | None = None
    """float32. Targets of the value function."""

    encoder_tokens: Tensor | None = None
    """int64 [B, S]. Encoder-decoder models only."""
    encoder_mask: Tensor | None = None
    """bool [B, S]. Encoder-decoder models only."""

    group: Tensor | None = None
    """int64 [B]. Rollouts that are compared with each other have the same number."""

    _found: tuple[Tensor, ...] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        """(row, column) of each response token: ``x[batch.at]`` is ``x[batch.response_mask]`` for x [B, T].

        A mask makes the host wait for the GPU, to learn how many entries are True. These indices are found on the host.
        """
        return self._find()[:2]

    @property
    def filled(self) -> Tensor:
        """The rows with a response token; the others only fill up the batch."""
        return self._find()[2]

    @property
    def pairs(self) -> Tensor:
        """The pairs (rows 2i and 2i + 1) whose first row is `filled`."""
        return self._find()[3]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def columns(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        named = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.init)
        return {name: tensor for name, tensor in named if tensor is not None}

    def rows(self, index) -> TokenBatch:
        """The rows at `index` (slice, list of int, int64 or bool tensor), trimmed."""
        return TokenBatch(**{name: tensor[index] for name, tensor in self.columns().items()}).trim()

    def num_tokens(self, index: list[int]) -> int:
        """How many prompt and response tokens the rows at `index` have."""
        decoder = int(self.attention_mask[index].sum())
        # with an encoder, each decoder row begins with a start token, which belongs to neither prompt nor response
        return decoder if self.encoder_mask is None else decoder - len(index) + int(self.encoder_mask[index].sum())

    def trim(self) -> TokenBatch:
        """Drops trailing columns in which no row has a token."""
        decoder, encoder = (None if x is None else _used_width(x) for x in (self.attention_mask, self.encoder_mask))
        trimmed = {}
        for name, x in self.columns().items():
            trimmed[name] = x if x.ndim == 1 else x[:, : encoder if name.startswith("encoder_") else decoder]
        return TokenBatch(**trimmed)

    def split(self, size: int) -> Iterator[TokenBatch]:
        """Consecutive pieces of at most `size` rows, each trimmed to its own width."""
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`."""
        moved = TokenBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in self.columns().items()})
        moved._found = tuple(x.to(device, non_blocking=True) for x in self._find())
        return moved

    def replace(self, **columns: Tensor) -> TokenBatch:
        """A copy with some columns set."""
        return dataclasses.replace(self, **columns)

    def _find(self) -> tuple[Tensor, ...]:
        if self._found is None:
            rows, columns = self.response_mask.nonzero(as_tuple=True)
            filled = rows.unique()
            self._found = rows, columns, filled, filled[filled % 2 == 0] // 2
        return self._found


@dataclass(slots=True)
class TokenOutputs:
    """What a model says about each response token of a batch. Never logits: losses need only these.

    Entries outside ``response_mask`` are 0 and carry no gradient.
    """

    logprobs: Tensor
    """float32 [B, T]."""
    values: Tensor | None = None
    """float32 [B, T]. Models with a value head."""
    q: Tensor | None = None
    """float32 [H, B, T]. Q of the chosen token, one row per Q head."""
    target_q: Tensor | None = None
    """float32 [H, B, T]. The same under the frozen target heads."""
    q_logprobs: Tensor | None = None
    """float32 [H, B, T]. log softmax of each Q head over the vocabulary, at the chosen token."""
    last: Tensor | None = None
    """float32 [B]. The score of the last token of each row. Reward models say this alone; their logprobs are 0."""


def _used_width(mask: Tensor) -> int:
    used = mask.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1
