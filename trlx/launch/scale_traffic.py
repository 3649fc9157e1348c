"""What the processes of a run on paper send each other in one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trlx.launch.scale import CHUNK_ELEMENTS, Parameters, Run, parameters
from trlx.launch.scale_memory import FLOAT

RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""How often a ring sends a tensor of N bytes, times (n - 1) / n for n processes (arXiv:2104.04473, 3.2)."""


@dataclass(frozen=True)
class Message:
    """A call of a collective, or a send to a neighbour, by every process of a stage."""

    group: str
    """"tensor", "pipeline", "embedding" (first and last stage) or "data"."""
    kind: str
    """"all_reduce", "all_gather", "reduce_scatter" or "send"."""
    size: int
    """Bytes of the whole tensor: of what is reduced, or of what is gathered."""
    times: int = 1


def traffic(run: Run, stage: int) -> dict[str, float]:
    """By group, the bytes that one process of a stage sends in one optimizer step, by ring algorithms."""
    ranks = {"tensor": run.parallel.tensor, "data": run.data, "embedding": 2, "pipeline": run.parallel.pipeline}
    totals = dict.fromkeys(ranks, 0.0)
    for message in messages(run, stage):
        n = ranks[message.group]
        share = 1 if message.kind == "send" else RING[message.kind] * (n - 1) / n
        totals[message.group] += share * message.size * message.times
    return totals


def messages(run: Run, stage: int) -> Iterator[Message]:
    """Everything sent in one step but a few numbers: the count of tokens, metrics, the norm of gradients."""
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
    """Calls per microbatch: two all-reduces forward, two backward (arXiv:1909.08053, 3).

    With sequence parallelism each is an all-gather and a reduce-scatter, and inputs that were kept in parts are
    gathered once more for the gradients of weights (arXiv:2205.05198, 4.2.2). Layers recomputed in full go forward
    twice.
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
    """Every rank looks up its own tokens; with learned positions the sum is shared out after they are added."""
    is_scattered = run.parallel.sequence and run.shape.position != "learned"
    yield Message("tensor", "reduce_scatter" if is_scattered else "all_reduce", state, run.microbatches)
    if run.parallel.sequence and run.unfrozen == -1:
        yield Message("tensor", "all_gather", state, run.microbatches)


def _scores(run: Run, state: int) -> Iterator[Message]:
    """One number per token for each reduction over the vocabulary, and the gradients of what the logits are made of."""
    if run.parallel.sequence:
        yield Message("tensor", "all_gather", state, run.microbatches)
    is_chunked = run.scored * run.vocab_part > CHUNK_ELEMENTS
    reductions = 3 + 5 * run.q_heads
    number = FLOAT * run.scored
    yield Message("tensor", "all_reduce", number, reductions * (2 if is_chunked else 1) * run.microbatches)
    if run.unfrozen:
        yield Message("tensor", "all_reduce", run.scored * run.element * run.shape.hidden_size, run.microbatches)
    if run.q_heads:
        yield Message("tensor", "all_reduce", number * 2 * run.shape.hidden_size, run.q_heads * run.microbatches)


def _pipeline(run: Run, stage: int) -> Iterator[Message]:
    """Hidden states to the next stage, their gradients to the one before if anything trains below; each tensor rank its
    part of a sequence."""
    chunks = run.parallel.virtual or 1
    sends = 2 * chunks - (1 if stage == 0 else 0) - (1 if run.is_last(stage) else 0)
    # interleaved stages send gradients that nobody wants as well
    if stage and run.parallel.virtual is None and not run.is_trained(run.layers(stage)[0] - 1):
        sends -= 1
    state = run.tokens * run.element * run.shape.hidden_size // run.sequence_split
    yield Message("pipeline", "send", state, sends * run.microbatches)
    if run.shape.tied and run.unfrozen == -1 and (stage == 0 or run.is_last(stage)):
        yield Message("embedding", "all_reduce", FLOAT * run.vocab_part * run.shape.hidden_size)


def _data(run: Run, count: Parameters) -> Iterator[Message]:
    """Float32 gradients, once a step; a distributed optimizer reduces each rank's part and gathers new weights
    (arXiv:1910.02054, 7)."""
    gradients = FLOAT * (count.trained + count.trained_heads)
    if not run.distributed:
        yield Message("data", "all_reduce", gradients)
        return
    yield Message("data", "reduce_scatter", gradients)
    yield Message("data", "all_gather", run.element * count.trained + FLOAT * count.trained_heads)
