"""How many bytes each process of a run holds. docs/scaling.md compares these formulas with measurements."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trlx.launch.plan.parameters import parameters
from trlx.launch.plan.run import Run
from trlx.models.logprobs import CHUNK_ELEMENTS

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one process of a stage, at the worst moment of an optimizer step."""

    weights: int
    gradients: int
    """Always float32. The data ranks do not divide them."""
    main_weights: float
    moments: float
    reference: int
    """The first values of the weights that train (PPO's reference model)."""
    activations: float
    """What layers keep for the backward pass, for all microbatches in flight."""
    temporary: float
    """The larger of two: scores and logits, or the activations of layers that are computed again."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def lasting(self) -> float:
        """Bytes that are also held between steps."""
        return self.total - self.activations - self.temporary


def memory(run: Run, stage: int) -> Memory:
    """Bytes on one process of a stage, without those of the allocator, NCCL and CUDA itself.

    Mixed-precision Adam is that of arXiv:1910.02054, 3.1: two float32 moments and, with bf16 or fp16, float32 main
    weights. A distributed optimizer divides these by the data ranks (stage 1 of that paper). Its padding is left out.
    """
    count, share = parameters(run, stage), run.data if run.distributed else 1
    trained = count.trained + count.trained_heads
    held = in_flight(run, stage)
    return Memory(
        weights=run.element * count.model + FLOAT * count.heads,
        gradients=FLOAT * trained,
        main_weights=FLOAT * count.trained / share if run.element < FLOAT else 0,
        moments=FLOAT * run.moments * trained / share,
        reference=run.element * count.trained if run.needs.reference else 0,
        activations=activations(run, stage) + held * (_sent(run, stage) + _received(run, stage)),
        temporary=max(score_activations(run, stage) + logits_at_once(run, stage), computed_again(run, stage)),
    )


def in_flight(run: Run, stage: int) -> int:
    """How many microbatches' activations a stage holds at once; an interleaved stage counts each chunk on its own.

    1F1B: p - stage (arXiv:2104.04473, 2.2.1). Interleaved: 2 (p - stage - 1) + (v - 1) p passes of warm-up and one
    more. For the first stage this is 1 + (p - 1) / (p v) times what p microbatches take without interleaving
    (arXiv:2205.05198, 4.2.3).
    """
    pipeline, chunks = run.parallel.pipeline, run.parallel.virtual
    if chunks is None:
        return min(run.microbatches, pipeline - stage)
    return min(run.microbatches * chunks, 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1)


def activations(run: Run, stage: int) -> float:
    """Bytes that the layers of a stage keep for all microbatches in flight, at the peak."""
    kept, held = chunk_activations(run, stage), in_flight(run, stage)
    if len(set(kept)) == 1:
        return held * kept[0]
    # chunks take turns, each for p microbatches: forward from the first chunk to the last, backward the other way
    turns = [kept[number // run.parallel.pipeline % len(kept)] for number in range(run.microbatches * len(kept))]
    backs = [kept[-1 - number // run.parallel.pipeline % len(kept)] for number in range(len(turns))]
    return max(sum(turns[: done + held]) - sum(backs[:done]) for done in range(len(turns)))


def layer_activations(run: Run) -> float:
    """Bytes that one layer keeps of one microbatch when nothing is computed again.

    The terms are those of arXiv:2205.05198, section 4, with the widths of this shape. GPT's shape (feed-forward 4 h, as
    many key-value heads as heads, half precision, dropout) gives that paper's s b h (34 + 5 a s / h), with two
    differences. The term 5 a s / h is absent: torch's fused kernel keeps one float32 per head and token instead of the
    attention scores. And norms keep mean and spread. Tensor ranks divide what is inside attention and feed-forward;
    with sequence parallelism they divide everything.
    """
    shape, e = run.shape, run.element
    inside = _attention(run) + e * shape.ffn_hidden_size * _feed_forward_copies(run)
    norms = 2 * (e * shape.hidden_size + _statistics(run))  # their output and their statistics
    inputs = (1 if shape.parallel_residual else 2) * _norm_input(run)
    masks = 2 * shape.hidden_size if run.dropout else 0  # one byte each on a GPU
    return run.tokens * (inside / run.parallel.tensor + (norms + inputs + masks) / run.sequence_split)


def chunk_activations(run: Run, stage: int) -> list[float]:
    """Bytes that the layers of each chunk of a stage keep of one microbatch.

    With full recomputation, each piece of layers keeps only its input (arXiv:2205.05198, 5). Layers below the lowest
    trained layer keep nothing.
    """
    found = []
    for trained in run.trained_layers(stage):
        everything, inputs = _divided(run, trained)
        found.append(everything * layer_activations(run) + inputs * _state(run))
    if stage == 0 and run.dropout and run.unfrozen == -1:
        found[0] += run.tokens * run.shape.hidden_size / run.sequence_split  # the dropout mask after the embedding
    return found


def score_activations(run: Run, stage: int) -> float:
    """Bytes that the last stage keeps after its layers: for the final norm, the heads, and two float32 copies of the
    logits and three of each Q. Above `CHUNK_ELEMENTS` logits are computed again in pieces, and no copies are kept."""
    if not run.is_last(stage):
        return 0
    hidden, held, trains = run.shape.hidden_size, 0, run.unfrozen != 0
    final_norm = trains * run.tokens * (_norm_input(run) + _statistics(run)) / run.sequence_split
    if not run.output_layer:
        return final_norm + run.rows * FLOAT * hidden
    if run.scored * run.vocab_part <= CHUNK_ELEMENTS:
        held += FLOAT * (run.vocab_part * (2 * trains + 3 * run.needs.q_heads) + 2 * hidden * run.needs.q_heads)
    as_float = FLOAT * hidden if run.element < FLOAT else 0
    held += run.needs.value_head * (as_float + FLOAT * 2 * hidden) + (as_float if run.needs.q_heads else 0)
    return final_norm + run.scored * (run.element * hidden + held)


def computed_again(run: Run, stage: int) -> float:
    """Bytes of the layers that are computed again together, without the input that they have kept.

    0 if other layers of the stage keep everything: those go backward first and free their memory before.
    """
    size = max(run.trained_layers(stage))
    if run.recompute.granularity != "full" or not size or _divided(run, size)[0]:
        return 0
    return layer_activations(run) * (run.recompute.num_layers if run.recompute.method == "uniform" else 1) - _state(run)


def cache(run: Run, stage: int, rows: int, tokens: int) -> int:
    """Bytes of keys and values for `rows` rows of `tokens` tokens on each data rank: two vectors a token and layer."""
    shape = run.shape
    width = shape.num_query_groups * shape.kv_channels // run.parallel.tensor
    return 2 * len(run.layers(stage)) * rows * tokens * width * run.element


def _divided(run: Run, layers: int) -> tuple[int, float]:
    """Of `layers` layers: (how many keep everything, how many pieces keep only their input)."""
    again = run.recompute
    if again.granularity != "full":
        return layers, 0
    if again.method == "uniform":
        return 0, -(-layers // again.num_layers)
    return max(0, layers - again.num_layers), min(layers, again.num_layers)


def _state(run: Run) -> float:
    """Bytes of the hidden states of a microbatch."""
    return run.tokens * run.element * run.shape.hidden_size / run.sequence_split


def _sent(run: Run, stage: int) -> float:
    """Bytes of the hidden states that the schedule still holds after it has sent them to the next stage."""
    return 0 if run.is_last(stage) else _state(run)


def _received(run: Run, stage: int) -> float:
    """Bytes of the hidden states that the schedule has received, unless the first layer keeps them as its input."""
    is_kept = run.is_trained(run.layers(stage)[0])
    return 0 if stage == 0 or is_kept else _state(run)


def _attention(run: Run) -> float:
    """Bytes per token: queries, keys, values, and the kernel's result, which is the input of the last projection.

    Values are a view of the first projection's output, so all of that output is kept. Rotary embeddings make new
    queries and keys, which are kept as well.
    """
    shape, e = run.shape, run.element
    heads, groups = (n * shape.kv_channels for n in (shape.num_attention_heads, shape.num_query_groups))
    kept = e * (heads + 2 * groups) + e * heads
    if shape.position == "rope":
        kept += e * (heads + groups)
    if shape.qk_norm:
        kept += e * heads + _statistics(run) * (shape.num_attention_heads + shape.num_query_groups)
    if run.recompute.granularity != "selective":
        kept += FLOAT * shape.num_attention_heads
    return kept


def _norm_input(run: Run) -> int:
    """Bytes per token of a norm's input. A norm with an offset computes in float32 and keeps that."""
    return run.shape.hidden_size * (FLOAT if run.shape.norm_offset else run.element)


def _statistics(run: Run) -> int:
    """Bytes per token of a norm's statistics: the spread and, for a LayerNorm, the mean."""
    return FLOAT * (2 if run.shape.normalization == "layernorm" else 1)


def _feed_forward_copies(run: Run) -> int:
    """How many vectors of the feed-forward's width are kept per token.

    Without a gate: the activation's input and result. With a gate: both inputs, the activation's result, a copy of the
    factor and the product. A ReLU keeps only its result.
    """
    is_relu = run.shape.activation == "relu"
    if run.shape.gated:
        return 3 if is_relu else 5
    return 1 if is_relu else 2


def logits_at_once(run: Run, stage: int) -> float:
    """Bytes that computing the scores takes for a moment: logits, exponentials and a gradient, in float32."""
    is_needed = run.is_last(stage) and run.output_layer
    return 3 * FLOAT * min(run.scored * run.vocab_part, CHUNK_ELEMENTS) if is_needed else 0
