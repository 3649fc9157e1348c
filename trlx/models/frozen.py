"""What the frozen blocks at the bottom of a model return, computed once for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trlx.batch import TokenBatch
from trlx.models.decoder import blocks, probing
from trlx.models.heads import ValueBranch
from trlx.models.packing import Packed
from trlx.models.policy import Policy


class KeptStates:
    """Hidden states of rows, by what `row_keys` says of them.

    Args:
        budget: the most bytes to keep where the states are.
        on_host: the most bytes to keep in pinned main memory, of rows that do not fit there.
    """

    def __init__(self, budget: float, on_host: float = 0):
        self.most = budget, on_host
        self.forget()

    def forget(self) -> None:
        """Drops what is kept, because other rows follow."""
        self.kept: dict[bytes, Tensor] = {}
        self.left = list(self.most)
        self.room: dict[bytes, tuple[int, int]] = {}
        """For each row where it has room, 0 or 1 as in `most`, and how many bytes."""

    def has_room(self, key: bytes, size: int) -> bool:
        """Whether there is room for the `size` bytes of a row, which takes it."""
        place = next((place for place, left in enumerate(self.left) if size <= left), None)
        if key not in self.room and place is not None:
            # pinned memory comes in powers of two
            self.left[place] -= 1 << (size - 1).bit_length() if place else size
            self.room[key] = place, size
        return key in self.room

    def keep(self, key: bytes, states: Tensor) -> None:
        """Keeps a copy of the states of a row that has room."""
        place, _ = self.room[key]
        self.kept[key] = _pinned_like(states).copy_(states, non_blocking=True) if place else states.clone()


class FrozenTrunk(KeptStates):
    """Keeps the output of the frozen blocks at the bottom of a policy's model for each row that was computed.

    No update changes this output, and it is the same for policy and reference. Rows are known by their tokens.

    Args:
        frozen: the frozen blocks, bottom first.
        is_tuple: whether they return it as the first of several.
        budget, on_host: see `KeptStates`. What does not fit is computed each time.
        around: returns a context in which the model runs, e.g. autocast.
    """

    def __init__(
        self,
        policy: Policy,
        frozen: list[nn.Module],
        is_tuple: bool,
        budget: float = float("inf"),
        on_host: float = 0,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ):
        super().__init__(budget, on_host)
        self.policy, self.frozen, self.is_tuple, self.around = policy, frozen, is_tuple, around

    @contextmanager
    def skipped(self, batch: TokenBatch, rows: Packed | None, device: torch.device | str) -> Iterator[None]:
        """Inside the block the model does not run its frozen blocks: it must read `batch`, for which they are known.

        `batch` is on the host; `rows`, as the policy gets them, on `device`.
        """
        padded = nn.utils.rnn.pad_sequence(self._states(batch, device), batch_first=True)
        joined = nn.functional.pad(padded, (0, 0, 0, batch.tokens.shape[1] - padded.shape[1]))
        if rows is not None:
            joined = joined.flatten(0, 1)[rows.at][None]
        with self.returning(joined):
            yield

    @contextmanager
    def returning(self, states: Tensor) -> Iterator[None]:
        """Inside the block the frozen blocks compute nothing and return `states` [B, T, d]."""
        output = (states, None) if self.is_tuple else states
        with ExitStack() as stack:
            for block in self.frozen:
                stack.callback(_set_forward, block, vars(block).get("forward"))
                block.forward = lambda *args, **kwargs: output
            yield

    @torch.no_grad()
    def compute(self, tokens: Tensor, *encoder: Tensor | None) -> Tensor:
        """The output [B, T, d] of the frozen blocks, of what `Architecture.states` takes; those above do not run."""

        def stop(block: nn.Module, args: tuple, output: Any) -> None:
            raise _Reached(output[0] if self.is_tuple else output)

        hook = self.frozen[-1].register_forward_hook(stop)
        try:
            with self.around():
                self.policy.architecture.states(tokens, *encoder)
        except _Reached as reached:
            return reached.args[0]
        finally:
            hook.remove()
        raise RuntimeError("The model did not run its frozen blocks")

    def _states(self, batch: TokenBatch, device: torch.device | str) -> list[Tensor]:
        """For each row [its number of tokens, d]."""
        keys = row_keys(batch)
        # of equal rows one
        missing = list({key: row for row, key in enumerate(keys) if key not in self.kept}.values())
        found = {key: self.kept[key] for key in keys if key in self.kept}
        # a resumed run computes other rows together; alone each has the same bits, which is slow on a GPU
        for rows in [[row] for row in missing] if torch.device(device).type == "cpu" else [missing] * bool(missing):
            for row, states in zip(rows, self._computed(batch.rows(rows), device), strict=True):
                found[keys[row]] = states
                if self.has_room(keys[row], states.nbytes):
                    self.keep(keys[row], states)
        return [found[key].to(device, non_blocking=True) for key in keys]

    def _computed(self, rows: TokenBatch, device: torch.device | str) -> list[Tensor]:
        lengths, there = rows.attention_mask.sum(dim=1).tolist(), rows.to(device)
        states = self.compute(there.tokens, there.encoder_tokens, there.encoder_mask)
        return [row[:length] for row, length in zip(states, lengths, strict=True)]


class _Reached(Exception):
    """Ends a forward pass; holds the output of the last frozen block."""


def frozen_trunk(
    policy: Policy, budget: float, on_host: float = 0, around: Callable[[], AbstractContextManager] = nullcontext
) -> FrozenTrunk | None:
    """What keeps the outputs of the frozen blocks of `policy`, or None where that is not possible.

    It is not if the embeddings or the lowest block train or have an adapter, or if the blocks above the frozen ones
    read more than their output. The frozen blocks must have no dropout.
    """
    if policy.model.get_input_embeddings().weight.requires_grad:
        return None
    stack = list(blocks(policy.model))
    top = len(policy.value_head.blocks) if isinstance(policy.value_head, ValueBranch) else 0
    outputs: list[Any] = []
    with probing(policy.model) as tokens, ExitStack() as hooks, torch.enable_grad():
        for block in stack:
            hooks.callback(block.register_forward_hook(lambda *call: outputs.append(call[-1])).remove)
        policy.architecture.states(tokens, tokens, torch.ones_like(tokens))
    if len(outputs) != len(stack):
        return None
    is_tuple = isinstance(outputs[0], tuple)
    states = [output[0] if is_tuple else output for output in outputs]
    count = min(_first_that_trains(states, policy), len(stack) - top)
    if count == 0:
        return None
    found = FrozenTrunk(policy, stack[:count], is_tuple, budget, on_host, around)
    return found if _agrees(found) else None


def _first_that_trains(states: list[Tensor], policy: Policy) -> int:
    """The index of the first of `states` that depends on a weight that trains; their number if none does."""
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    for index, each in enumerate(states):
        # activation checkpointing lets the embeddings' output require gradients that no weight gets
        if weights and each.requires_grad:
            found = torch.autograd.grad(each.sum(), weights, allow_unused=True, retain_graph=True)
            if any(gradient is not None for gradient in found):
                return index
    return len(states)


def _agrees(trunk: FrozenTrunk) -> bool:
    """Whether the model computes the same from the kept output as from tokens."""
    states = trunk.policy.architecture.states
    with probing(trunk.policy.model) as tokens:
        mask = torch.ones_like(tokens)
        kept, expected = trunk.compute(tokens, tokens, mask), states(tokens, tokens, mask)
        states(tokens.flip(1), tokens, mask)  # in case modules remember something of their last call
        try:
            with trunk.returning(kept):
                return torch.equal(states(tokens, tokens, mask), expected)
        except (TypeError, ValueError, AttributeError, IndexError):
            return False


def row_keys(batch: TokenBatch) -> list[bytes]:
    """The tokens of each row without padding, also the encoder's."""
    parts = [(batch.tokens, batch.attention_mask)]
    if batch.encoder_tokens is not None:
        parts.append((batch.encoder_tokens, batch.encoder_mask))
    rows = [[row[used].numpy().tobytes() for row, used in zip(*part, strict=True)] for part in parts]
    return [b"|".join(each) for each in zip(*rows, strict=True)]


def _pinned_like(states: Tensor) -> Tensor:
    return torch.empty_like(states, device="cpu", pin_memory=True)


def _set_forward(module: nn.Module, forward: Callable | None) -> None:
    """Gives `module` its own `forward` back; None: that of its class."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward
