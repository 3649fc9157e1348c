"""A run on paper: how a decoder is divided over processes, and how many parameters each of them holds.

Nothing is built. Memory is in ``scale_memory``, what processes send each other in ``scale_traffic``.
"""

from __future__ import annotations

from dataclasses import dataclass

from trlx.backends.megatron.mapping import padded_vocab
from trlx.backends.megatron.settings import Parallel, Recompute
from trlx.backends.megatron.shape import Shape

CHUNK_ELEMENTS = 2**26
"""Most logits that a process holds at once; see ``trlx.models.logprobs``."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What memory and traffic depend on. Rows all have `length` tokens, the last `response` of which are scored."""

    shape: Shape
    parallel: Parallel
    data: int = 1
    """Copies of the model, each with rows of its own."""
    rows: int
    """Rows per forward pass."""
    microbatches: int
    """Forward passes per optimizer step and data rank."""
    length: int
    response: int
    element: int = 2
    """Bytes of a weight and of an activation: 4, or 2 with float32 main weights beside."""
    recompute: Recompute = Recompute()
    distributed: bool = False
    """Main weights and moments are shared out over data ranks."""
    moments: int = 2
    """Running averages that the optimizer keeps of each weight."""
    value_head: bool = False
    q_heads: int = 0
    reference: bool = False
    unfrozen: int = -1
    """``model.num_layers_unfrozen``."""
    dropout: bool = False
    divisor: int = 128
    """``make_vocab_size_divisible_by``."""

    @property
    def gpus(self) -> int:
        return self.parallel.tensor * self.parallel.pipeline * self.data

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.rows * self.length

    @property
    def scored(self) -> int:
        """Tokens of a microbatch that get a log-probability."""
        return self.rows * self.response

    @property
    def vocab_part(self) -> int:
        """Rows of the vocabulary, padding included, on each tensor rank."""
        tensor = self.parallel.tensor
        return padded_vocab(self.shape.vocab_size, self.divisor * tensor) // tensor

    @property
    def sequence_split(self) -> int:
        """Into how many parts what is outside attention and feed-forward is divided (arXiv:2205.05198, 4.2.2)."""
        return self.parallel.tensor if self.parallel.sequence else 1

    @property
    def stages(self) -> range:
        return range(self.parallel.pipeline)

    def is_last(self, stage: int) -> bool:
        return stage == self.parallel.pipeline - 1

    def layers(self, stage: int) -> list[int]:
        """Numbers of the layers of a stage; an interleaved stage has several runs of them (arXiv:2104.04473, 2.2.2)."""
        pipeline, chunks = self.parallel.pipeline, self.parallel.virtual or 1
        size = self.shape.num_layers // (pipeline * chunks)
        firsts = [(chunk * pipeline + stage) * size for chunk in range(chunks)]
        return [first + i for first in firsts for i in range(size)]

    def trained_layers(self, stage: int) -> list[int]:
        """How many layers train in each chunk of a stage. Gradients go through them alone, those on top."""
        layers, chunks = self.layers(stage), self.parallel.virtual or 1
        size = len(layers) // chunks
        return [sum(map(self.is_trained, layers[size * chunk : size * (chunk + 1)])) for chunk in range(chunks)]

    def is_trained(self, layer: int) -> bool:
        return self.unfrozen == -1 or layer >= self.shape.num_layers - self.unfrozen


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights on one process."""

    model: int
    """Of the language model, in the type of the run; padding rows of the vocabulary and a tied copy count."""
    trained: int
    """Of these, those that train."""
    heads: int
    """Of V and Q heads and their targets, always float32."""
    trained_heads: int
    replicated: int
    """Trained, the same on every tensor rank, and with a gradient on each from its own part of the sequence only."""


def parameters(run: Run, stage: int) -> Parameters:
    """What every process of a pipeline stage holds; exact.

    Tensor ranks divide queries, keys, values and the first feed-forward matrix by rows, the other two by columns
    (arXiv:1909.08053, 3), the embedding by tokens; norms and the biases behind a sum are on all of them.
    """
    shape, layers = run.shape, run.layers(stage)
    trained = sum(map(run.is_trained, layers))
    divided, whole = layer_parameters(shape, run.parallel.tensor)
    counts = {"model": (divided + whole) * len(layers), "trained": (divided + whole) * trained}
    table, positions = run.vocab_part * shape.hidden_size, shape.max_position_embeddings * shape.hidden_size
    if stage == 0:
        embedding = table + (positions if shape.position == "learned" else 0)
        counts["model"] += embedding
        counts["trained"] += embedding if run.unfrozen == -1 else 0
    norm = 0
    if run.is_last(stage):
        norm = norm_parameters(shape, shape.hidden_size)
        has_own = not shape.tied or run.parallel.pipeline > 1
        trains = run.unfrozen == -1 or (run.unfrozen > 0 and not shape.tied)
        counts["model"] += norm + (table if has_own else 0)
        norm = norm if run.unfrozen else 0
        counts["trained"] += norm + (table if has_own and trains else 0)
    heads, trained_heads = _heads(run) if run.is_last(stage) else (0, 0)
    return Parameters(**counts, heads=heads, trained_heads=trained_heads, replicated=_replicated(run, trained, norm))


def layer_parameters(shape: Shape, tensor: int) -> tuple[int, int]:
    """Of one layer on one tensor rank: those that are divided, and those that every rank has."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads * shape.kv_channels
    qkv = heads + 2 * shape.num_query_groups * shape.kv_channels
    up = shape.ffn_hidden_size * (2 if shape.gated else 1)
    matrices = qkv * hidden + heads * hidden + up * hidden + shape.ffn_hidden_size * hidden
    biases = (qkv if shape.qkv_bias else 0) + (up if shape.bias else 0)
    norms = 2 * norm_parameters(shape, hidden) + qk_norm_parameters(shape)
    return (matrices + biases) // tensor, norms + (2 * hidden if shape.bias else 0)


def norm_parameters(shape: Shape, width: int) -> int:
    """Of one norm."""
    return width * (2 if shape.normalization == "layernorm" else 1)


def qk_norm_parameters(shape: Shape) -> int:
    """Of the norms of queries and keys of one layer."""
    return 2 * norm_parameters(shape, shape.kv_channels) if shape.qk_norm else 0


def total_parameters(shape: Shape) -> int:
    """Of the language model, without padding, every weight once."""
    table = shape.vocab_size * shape.hidden_size
    positions = shape.max_position_embeddings * shape.hidden_size if shape.position == "learned" else 0
    layers = shape.num_layers * sum(layer_parameters(shape, 1))
    return table * (1 if shape.tied else 2) + positions + layers + norm_parameters(shape, shape.hidden_size)


def bubble(run: Run) -> float:
    """The share of a step in which a stage waits: ((p - 1) / v) / (m + (p - 1) / v), arXiv:2104.04473, 2.2.

    That paper divides by the time without the bubble, m, instead. Stages are taken to be equally fast.
    """
    waiting = (run.parallel.pipeline - 1) / (run.parallel.virtual or 1)
    return waiting / (run.microbatches + waiting)


def _replicated(run: Run, trained_layers: int, final_norm: int) -> int:
    """Only a layer's norms and late biases see parts of a sequence; norms of queries and keys see some heads each."""
    if run.parallel.tensor == 1:
        return 0
    if not run.parallel.sequence:
        return trained_layers * qk_norm_parameters(run.shape)
    return trained_layers * layer_parameters(run.shape, 1)[1] + final_norm


def _heads(run: Run) -> tuple[int, int]:
    """All and trained: d -> 2d -> 1 for V, d -> 2d -> vocabulary part for each Q and its frozen target."""
    hidden = run.shape.hidden_size
    first = 2 * hidden * (hidden + 1)
    value = first + 2 * hidden + 1 if run.value_head else 0
    q = run.q_heads * (first + (2 * hidden + 1) * run.vocab_part)
    return value + 2 * q, value + q
