"""Runs microbatches through the pipeline: forward only, or forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from trlx.backends.megatron.frozen import FrozenLayers, Keys
from trlx.backends.megatron.model import PolicyStage
from trlx.backends.megatron.parallel import pipeline_group
from trlx.batch import TokenBatch, TokenOutputs

Result = Any
OnOutputs = Callable[[TokenOutputs, TokenBatch], tuple[Tensor, Result]]
"""From the outputs of one microbatch to (loss, a result to keep)."""


@dataclass(frozen=True)
class Reading:
    """Which microbatches of a run have the output of their frozen layers kept."""

    trunk: FrozenLayers
    keys: list[Keys | None]
    """For each microbatch those of its rows; None if not all of them are kept, so that the microbatch runs whole."""


def run_forward(
    stage: list[nn.Module], microbatches: Sequence[TokenBatch], reading: Reading | None = None
) -> list[TokenOutputs]:
    """The outputs of each microbatch on the last stage; an empty list on the others."""

    def keep(outputs: TokenOutputs, non_loss_data: bool = True) -> TokenOutputs:
        return outputs

    with torch.no_grad():
        kwargs = {"forward_only": True, "collect_non_loss_data": True, **_communicator(stage, reading)}
        return _run(stage, microbatches, lambda _: keep, reading, **kwargs)


def run_forward_backward(
    stage: list[nn.Module], microbatches: Sequence[TokenBatch], on_outputs: OnOutputs, reading: Reading | None = None
) -> tuple[list[Result], float]:
    """Accumulates the gradients of all microbatches, averages them over data ranks, and sums those of shared weights.

    Returns the results of `on_outputs` (on the last stage) and the seconds of the forward passes.
    """
    clock = _Clock()

    def on_last(microbatch: TokenBatch) -> Callable:
        return partial(_undivided, on_outputs, microbatch, len(microbatches))

    chunks = [chunk.module for chunk in stage]
    return _run(stage, microbatches, on_last, reading, clock=clock, **_communicator(chunks, reading)), clock.seconds


def _undivided(
    on_outputs: OnOutputs, microbatch: TokenBatch, num_microbatches: int, outputs: TokenOutputs
) -> tuple[Tensor, Result]:
    loss, kept = on_outputs(outputs, microbatch)
    return loss * num_microbatches, kept  # Megatron-Core divides the loss by it, in place


def _communicator(stage: list[PolicyStage], reading: Reading | None) -> dict[str, Any]:
    """Arguments of the schedule that make stages communicate through `_StageCommunicator`.

    Empty for a single stage and for interleaved stages, which use Megatron-Core's own communication.
    """
    if len(stage) > 1 or pipeline_group().size() == 1:
        return {}
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp", "dp_cp", "embd", "pos_embd"])
    return {"p2p_communicator": _StageCommunicator(stage[0], reading), "pg_collection": groups}


class _StageCommunicator(P2PCommunicator):
    """Sends hidden states forward, and gradients back only to stages that train or have trained layers below.

    Nothing is sent forward to the stage that keeps the hidden states of a microbatch, nor to those below it.
    """

    def __init__(self, model: PolicyStage, reading: Reading | None):
        super().__init__(pipeline_group(), model.config)
        self.model = model
        self.known = repeat(False) if reading is None else iter([keys is not None for keys in reading.keys])

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        **kwargs: Any,
    ) -> Any:
        is_nothing = tensor_send_next is not None and tensor_send_next.numel() == 0
        return super()._communicate(
            tensor_send_next=None if is_nothing else tensor_send_next,
            tensor_send_prev=tensor_send_prev if self.model.trains_below else None,
            recv_prev=recv_prev and not (next(self.known) and not self.model.trains_below),
            recv_next=recv_next and self.model.wants_gradients,
            **kwargs,
        )


class _Clock:
    seconds = 0.0


def _run(
    stage: list[nn.Module],
    microbatches: Sequence[TokenBatch],
    on_last: Callable[[TokenBatch], Callable],
    reading: Reading | None = None,
    clock: _Clock | None = None,
    **kwargs: Any,
) -> list[Any]:
    clock = clock or _Clock()
    keys_of = reading.keys if reading is not None else [None] * len(microbatches)
    turns = list(zip(microbatches, keys_of, strict=True))

    def step(iterator: Iterator, model: nn.Module) -> tuple[Any, Callable]:
        (microbatch, keys), began = next(iterator), time.perf_counter()
        tokens, kept = microbatch.tokens, keys and reading.trunk.states(keys, microbatch.tokens.shape[1])
        if keys and reading.trunk.is_below:
            output = torch.empty(0, device=tokens.device)
        else:
            output = model(tokens, microbatch.at, microbatch.attention_mask.sum(dim=1), kept=kept)
        clock.seconds += time.perf_counter() - began
        return output, on_last(microbatch)

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(turns) for _ in stage],
        model=stage,
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].tokens.shape[1],
        micro_batch_size=len(microbatches[0]),
        **{"forward_only": False, **kwargs},
    )
