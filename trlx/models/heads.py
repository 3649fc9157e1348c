"""The heads beside the language model's own: values of states, and Q of actions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trlx.methods.ilql import polyak_
from trlx.models.decoder import after_blocks, blocks, probing, trunk
from trlx.models.logprobs import Chosen, in_chunks


class ValueHead(nn.Module):
    """V(state) from the policy's own hidden state: d -> 2d -> 1 with ReLU, always in float32.

    The last layer starts at 0, so that the first values are 0 and add no noise to advantages.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.layers = _mlp(hidden, 1)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def watching(self) -> AbstractContextManager:
        """A context for the run of the trunk; this head needs none."""
        return nullcontext()

    def states(self, hidden: Tensor) -> Tensor:
        """The input of `forward` [B, T, d], from the trunk's hidden states."""
        return hidden

    def forward(self, states: Tensor) -> Tensor:
        """Values [N] float32 of states [N, d] of any float dtype."""
        with torch.autocast(states.device.type, enabled=False):
            return self.layers(states.float()).squeeze(-1)


class ValueBranch(nn.Module):
    """V(state) from a trainable copy of the model's top `num_layers` blocks, which gets the input of the originals.

    Masks and position embeddings are those that the model itself passes, so this works for any architecture. Gradients
    flow into the blocks below the copied ones.

    Raises:
        ValueError: `num_layers` is not between 1 and the number of blocks, or the copy does not reproduce the trunk.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int):
        super().__init__()
        stack = blocks(model)
        if not 1 <= num_layers <= len(stack):
            raise ValueError(
                f"num_value_layers_unfrozen is {num_layers}, but {type(model).__name__} has {len(stack)} blocks."
            )
        # a tuple, so that the live blocks are not registered as submodules
        self._live = tuple(stack[-num_layers:])
        self._calls: list[tuple[tuple, dict]] = []
        self.blocks = copy.deepcopy(stack[-num_layers:]).requires_grad_(True)
        self.after = copy.deepcopy(nn.ModuleList(after_blocks(model))).requires_grad_(True)
        self.head = ValueHead(self._checked_width(model))
        self.train(model.training)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes the arguments of each live top block while the trunk runs in this context."""
        self._calls = []
        with ExitStack() as stack:
            for block in self._live:
                stack.callback(block.register_forward_pre_hook(self._note, with_kwargs=True).remove)
            yield

    def states(self, hidden: Tensor) -> Tensor:
        """The branch's own hidden states [B, T, d] for the batch in `watching`; `hidden` is not used."""
        calls, self._calls = self._calls, []
        states = calls[0][0][0]
        for block, (args, kwargs) in zip(self.blocks, calls, strict=True):
            output = block(states, *args[1:], **kwargs)
            states = output[0] if isinstance(output, (tuple, list)) else output
        for module in self.after:
            states = module(states)
        return states

    def forward(self, states: Tensor) -> Tensor:
        """Values [N] float32 of states [N, d]."""
        return self.head(states)

    def _note(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self._calls.append((args, kwargs))

    def _checked_width(self, model: PreTrainedModel) -> int:
        self.eval()
        with probing(model) as tokens:
            with self.watching():
                expected = trunk(model)(tokens, use_cache=False)[0]
            states = self.states(expected)
        tolerance = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
        if states.shape != expected.shape or not (states - expected).abs().max() <= tolerance:
            raise ValueError(
                f"{type(model).__name__} does more after its blocks than a norm, so the value function cannot have "
                "blocks of its own: set num_value_layers_unfrozen to 0."
            )
        return states.shape[-1]


class QHeads(nn.Module):
    """Q(state, action) for every token of the vocabulary, with frozen target copies (ILQL, arXiv:2206.11871).

    Each head is d -> 2d -> V with ReLU in float32.
    """

    def __init__(self, hidden: int, vocab_size: int, num_heads: int):
        super().__init__()
        self.heads = nn.ModuleList(_mlp(hidden, vocab_size) for _ in range(num_heads))
        self.targets = copy.deepcopy(self.heads).requires_grad_(False)

    def forward(self, hidden: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, target Q and log softmax(Q) of `actions` [N] in the states `hidden` [N, d]; each [heads, N] float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            with torch.no_grad():
                targets = [in_chunks(partial(_q, target), hidden, actions, target) for target in self.targets]
            found = [in_chunks(partial(_q_and_logprob, head), hidden, actions, head) for head in self.heads]
        q, logprobs = torch.stack(found, dim=1)
        return q, torch.stack(targets), logprobs

    def lowest_target(self, hidden: Tensor) -> Tensor:
        """The lowest target Q [N, V] float32 of every token in the states `hidden` [N, d]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.stack([target(hidden.float()) for target in self.targets]).amin(dim=0)

    def sync(self, alpha: float) -> None:
        """Moves the targets towards the heads: target <- alpha head + (1 - alpha) target."""
        polyak_(self.targets, self.heads, alpha)


def _q(head: nn.Module, hidden: Tensor, actions: Tensor) -> Tensor:
    return head(hidden).gather(1, actions[:, None]).squeeze(1)


def _q_and_logprob(head: nn.Module, hidden: Tensor, actions: Tensor) -> Tensor:
    return torch.stack(Chosen.apply(head(hidden), actions))


def _mlp(hidden: int, out: int) -> nn.Sequential:
    linear = partial(nn.Linear, dtype=torch.float32)
    return nn.Sequential(linear(hidden, 2 * hidden), nn.ReLU(), linear(2 * hidden, out))
