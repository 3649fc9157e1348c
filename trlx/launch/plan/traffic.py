"""What the processes of a run send each other in one optimizer step, and how long they wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trlx.launch.plan.memory import FLOAT
from trlx.launch.plan.parameters import Parameters, parameters
from trlx.launch.plan.run import Run
from trlx.models.logprobs import CHUNK_ELEMENTS

RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""A ring of n processes sends a tensor of N bytes this many times (n - 1) / n N bytes (arXiv:2104.04473, 3.2)."""


@dataclass(frozen=True)
class Message:
    """A collective that every process of a stage takes part in, or a send to the neighbouring stage."""

    group: str
    """"tensor", "pipeline", "embedding" (first and last stage) or "data"."""
    kind: str
    """"all_reduce", "all_gather", "reduce_scatter" or "send"."""
    size: int
    """Bytes of the whole tensor that is reduced, gathered or sent."""
    times: int = 1


def traffic(run: Run, stage: int) -> dict[str, float]:
    """For each group, the bytes that one process of a stage sends in one optimizer step, with ring algorithms."""
    ranks = {"tensor": run.parallel.tensor, "data": run.data, "embedding": 2, "pipeline": run.parallel.pipeline}
    totals = dict.fromkeys(ranks, 0.0)
    for message in messages(run, stage):
        n = ranks[message.group]
        share = 1 if message.kind == "send" else RING[message.kind] * (n - 1) / n
        totals[message.group] += share * message.size * message.times
    return totals


def bubble(run: Run) -> float:
    """The share of a step in which a stage waits: ((p - 1) / v) / (m + (p - 1) / v), if all stages are equally fast.

    arXiv:2104.04473, 2.2 divides by m instead, which is the time without the bubble.
    """
    waiting = (run.parallel.pipeline - 1) / (run.parallel.virtual or 1)
    return waiting / (run.microbatches + waiting)


def messages(run: Run, stage: int) -> Iterator[Message]:
    """Every message of one step, except for single numbers: the count of tokens, metrics, the norm of gradients."""
    count = parameters(run, stage)
    if run.parallel.tensor > 1:
        yield from _tensor(run, stage, count)
    if run.parallel.pipeline > 1:
        yield from _pipeline(run, stage)
    if run.data > 1:
        yield from _data(run, count)


def _tensor(run: Run, stage: int, count: Parameters) -> Iterator[Message]:
    state = run.tokens * run.element * run.shape.hidden_size
    for kind, times in _per_layer(run, stage).items():
        yield Message("tensor", kind, state, times * run.microbatches)
    if stage == 0:
        yield from _embedding(run, state)
    if run.is_last(stage):
        yield from _scores(run, state)
    if count.replicated:
        yield Message("tensor", "all_reduce", FLOAT * count.replicated)


def _per_layer(run: Run, stage: int) -> dict[str, int]:
    """Calls per microbatch: each layer takes two all-reduces forward and two backward (arXiv:1909.08053, 3).

    With sequence parallelism each of them becomes an all-gather and a reduce-scatter, and the two kept inputs, of which
    each rank has a part, are gathered again for the gradients of the weights (arXiv:2205.05198, 4.2.2). With full
    recomputation layers go forward twice.
    """
    backward = sum(run.trained_layers(stage))
    forward = len(run.layers(stage)) + _twice_forward(run, backward)
    if not run.parallel.sequence:
        return {"all_reduce": 2 * (forward + backward)}
    return {"all_gather": 2 * forward + 4 * backward, "reduce_scatter": 2 * (forward + backward)}


def _twice_forward(run: Run, layers: int) -> int:
    if run.recompute.granularity != "full":
        return 0
    if run.recompute.method == "uniform":
        return layers
    return min(layers, run.recompute.num_layers * (run.parallel.virtual or 1))


def _embedding(run: Run, state: int) -> Iterator[Message]:
    """Each rank looks up its part of the vocabulary, and the results are summed. With sequence parallelism the sum is
    scattered over the ranks at once; with learned positions, only after these are added."""
    is_scattered = run.parallel.sequence and run.shape.position != "learned"
    yield Message("tensor", "reduce_scatter" if is_scattered else "all_reduce", state, run.microbatches)
    if run.parallel.sequence and run.unfrozen == -1:
        yield Message("tensor", "all_gather", state, run.microbatches)


def _scores(run: Run, state: int) -> Iterator[Message]:
    """One number per token for each reduction over the vocabulary, and the gradients of the heads' inputs."""
    if run.parallel.sequence:
        yield Message("tensor", "all_gather", state, run.microbatches)
    if not run.output_layer:
        return
    is_chunked = run.scored * run.vocab_part > CHUNK_ELEMENTS
    reductions = 3 + 5 * run.needs.q_heads
    number = FLOAT * run.scored
    yield Message("tensor", "all_reduce", number, reductions * (2 if is_chunked else 1) * run.microbatches)
    if run.unfrozen:
        yield Message("tensor", "all_reduce", run.scored * run.element * run.shape.hidden_size, run.microbatches)
    if run.needs.q_heads:
        yield Message("tensor", "all_reduce", number * 2 * run.shape.hidden_size, run.needs.q_heads * run.microbatches)


def _pipeline(run: Run, stage: int) -> Iterator[Message]:
    """A stage sends hidden states to the next stage, and their gradients to the previous one if a layer trains there.
    With sequence parallelism each tensor rank sends its part of the sequence."""
    chunks = run.parallel.virtual or 1
    sends = 2 * chunks - (1 if stage == 0 else 0) - (1 if run.is_last(stage) else 0)
    # the interleaved schedule sends these gradients always
    if stage and run.parallel.virtual is None and not run.is_trained(run.layers(stage)[0] - 1):
        sends -= 1
    state = run.tokens * run.element * run.shape.hidden_size // run.sequence_split
    yield Message("pipeline", "send", state, sends * run.microbatches)
    if run.shape.tied and run.output_layer and run.unfrozen == -1 and (stage == 0 or run.is_last(stage)):
        yield Message("embedding", "all_reduce", FLOAT * run.vocab_part * run.shape.hidden_size)


def _data(run: Run, count: Parameters) -> Iterator[Message]:
    """Float32 gradients, once per step. A distributed optimizer reduces only each rank's part, and then gathers the new
    weights (arXiv:1910.02054, 7)."""
    gradients = FLOAT * (count.trained + count.trained_heads)
    if not run.distributed:
        yield Message("data", "all_reduce", gradients)
        return
    yield Message("data", "reduce_scatter", gradients)
    yield Message("data", "all_gather", run.element * count.trained + FLOAT * count.trained_heads)
