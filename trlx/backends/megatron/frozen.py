"""What the frozen layers return is kept by the stage of the first trained layer, so that they run once for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp, all_to_all_sp2hp
from torch import Tensor, nn

from trlx.backends.megatron.model import PolicyStage
from trlx.backends.megatron.parallel import ParallelState, pipeline_group, tensor_group
from trlx.batch import TokenBatch
from trlx.models.frozen import KeptStates
from trlx.models.memory import room_for_states

Keys = Sequence[bytes]
"""What the rows of a microbatch are known by, see `trlx.models.frozen.row_keys`."""


class FrozenLayers(KeptStates):
    """The hidden states that enter the first layer that trains, for each row.

    The stage of that layer keeps them, and the stages below it compute and send nothing for rows that are kept. All
    processes of a data rank see the same rows in the same order, so each knows what is kept without a message.

    With sequence parallelism a process has some tokens of a row, and which ones depends on the width of the microbatch.
    It keeps some of the numbers of every token instead.
    """

    def __init__(self, model: PolicyStage, parallel: ParallelState, budget: float, on_host: float):
        super().__init__(budget, on_host)
        self.model, self.sizes, self.device = model, parallel.sizes, parallel.device
        self.link = P2PCommunicator(pipeline_group(), model.config) if parallel.sizes.pipeline > 1 else None
        self.is_below = not model.wants_gradients and not model.post_process
        """Whether a stage above this one keeps the states."""
        self.holds = not self.is_below and not model.trains_below
        """Whether this stage keeps the states."""
        self.width = model.config.hidden_size // (parallel.sizes.tensor if parallel.sizes.sequence else 1)

    def reserve(self, keys: Keys, lengths: Sequence[int]) -> list[int]:
        """Which of these rows must be computed, because they are not kept and there is room for them."""
        missing, size = [], self.width * self.model.config.params_dtype.itemsize
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            if key not in self.room and self.has_room(key, length * size):
                missing.append(row)
        return missing

    @torch.no_grad()
    def compute(self, microbatches: Sequence[TokenBatch], keys: Sequence[Keys]) -> None:
        """Runs the frozen layers on rows that `reserve` named, and keeps what they return."""
        if not (self.is_below or self.holds):
            return
        for microbatch, own in zip(microbatches, keys, strict=True):
            if not self.model.pre_process:
                self.model.set_input_tensor(self.link.recv_forward(microbatch.tokens.shape, False))
            states = self.model.below(microbatch.tokens)
            if self.is_below:
                self.link.send_forward(states, False)
                continue
            if self.sizes.sequence:
                states = all_to_all_sp2hp(states, tensor_group()).view(-1, len(own), self.width)
            for row, key in enumerate(own):
                length = self.room[key][1] // states[0, row].nbytes
                self.keep(key, states[:length, row])

    @torch.no_grad()
    def states(self, keys: Keys, width: int) -> Tensor | None:
        """What is kept of these rows as the layers take it, `width` tokens wide; None on stages that do not keep it."""
        if not self.holds:
            return None
        states = nn.utils.rnn.pad_sequence([self.kept[key].to(self.device, non_blocking=True) for key in keys])
        states = nn.functional.pad(states, (0, 0, 0, 0, 0, width - len(states)))
        if self.sizes.sequence:
            states = all_to_all_hp2sp(states, tensor_group()).view(-1, len(keys), self.model.config.hidden_size)
        return states


def frozen_layers(
    stage: Sequence[PolicyStage], parallel: ParallelState, setting: str | int, unfrozen: int, has_dropout: bool
) -> FrozenLayers | None:
    """What keeps the output of the frozen layers, or None where that is not possible or saves nothing.

    Args:
        setting: ``train.cache_hidden_states``.
        unfrozen: ``model.num_layers_unfrozen``.
        has_dropout: whether frozen layers drop anything out in training.
    """
    config, sizes = stage[0].config, parallel.sizes
    is_divided = not sizes.sequence or config.hidden_size % sizes.tensor == 0
    if setting == "off" or has_dropout or unfrozen in (-1, config.num_layers) or sizes.virtual or not is_divided:
        return None
    room = torch.tensor(room_for_states(setting, parallel.device, dist.get_world_size()), device=parallel.device)
    dist.all_reduce(room, op=dist.ReduceOp.MIN)  # all must agree on what is kept
    return FrozenLayers(stage[0], parallel, *room.tolist())
