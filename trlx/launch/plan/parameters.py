"""How many parameters each process of a run holds."""

from __future__ import annotations

from dataclasses import dataclass

from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.launch.plan.run import Run


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights on one process."""

    model: int
    """Weights of the language model. Padding rows of the vocabulary and the copy of a tied embedding count."""
    trained: int
    """Those of `model` that train."""
    heads: int
    """Weights of the heads and of the Q targets, always float32."""
    trained_heads: int
    replicated: int
    """Trained weights that are the same on every tensor rank, while each rank has only a part of their gradient."""


def parameters(run: Run, stage: int) -> Parameters:
    """The weights that every process of a pipeline stage holds, exactly.

    Tensor ranks divide queries, keys, values and the first feed-forward matrix by rows, the other two matrices by
    columns (arXiv:1909.08053, 3), and the embedding by tokens. Every rank has all norms, and the biases that are added
    after an all-reduce.
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
        has_own = run.output_layer and (not shape.tied or run.parallel.pipeline > 1)
        trains = run.unfrozen == -1 or (run.unfrozen > 0 and not shape.tied)
        counts["model"] += norm + (table if has_own else 0)
        norm = norm if run.unfrozen else 0
        counts["trained"] += norm + (table if has_own and trains else 0)
    heads, trained_heads = _heads(run) if run.is_last(stage) else (0, 0)
    return Parameters(**counts, heads=heads, trained_heads=trained_heads, replicated=_replicated(run, trained, norm))


def layer_parameters(shape: DecoderConfig, tensor: int) -> tuple[int, int]:
    """Weights of one layer on one tensor rank: (its part of the divided ones, those that every rank has)."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads * shape.kv_channels
    qkv = heads + 2 * shape.num_query_groups * shape.kv_channels
    up = shape.ffn_hidden_size * (2 if shape.gated else 1)
    matrices = qkv * hidden + heads * hidden + up * hidden + shape.ffn_hidden_size * hidden
    biases = (qkv if shape.qkv_bias else 0) + (up if shape.bias else 0)
    norms = 2 * norm_parameters(shape, hidden) + qk_norm_parameters(shape)
    return (matrices + biases) // tensor, norms + (2 * hidden if shape.bias else 0)


def norm_parameters(shape: DecoderConfig, width: int) -> int:
    """Weights of one norm."""
    return width * (2 if shape.normalization == "layernorm" else 1)


def qk_norm_parameters(shape: DecoderConfig) -> int:
    """Weights of the norms of queries and keys in one layer."""
    return 2 * norm_parameters(shape, shape.kv_channels) if shape.qk_norm else 0


def total_parameters(shape: DecoderConfig, output_layer: bool = True) -> int:
    """Weights of the language model: no padding, and a tied embedding counts once."""
    table = shape.vocab_size * shape.hidden_size
    positions = shape.max_position_embeddings * shape.hidden_size if shape.position == "learned" else 0
    layers = shape.num_layers * sum(layer_parameters(shape, 1))
    return (
        table * (2 if output_layer and not shape.tied else 1)
        + positions
        + layers
        + norm_parameters(shape, shape.hidden_size)
    )


def _replicated(run: Run, trained_layers: int, final_norm: int) -> int:
    """With sequence parallelism, norms and late biases see a part of the sequence on each rank; without it, only the
    norms of queries and keys differ: they see the heads of their rank."""
    if run.parallel.tensor == 1:
        return 0
    if not run.parallel.sequence:
        return trained_layers * qk_norm_parameters(run.shape)
    return trained_layers * layer_parameters(run.shape, 1)[1] + final_norm


def _heads(run: Run) -> tuple[int, int]:
    """(All, trained): h -> 2h -> 1 for V; h -> 2h -> part of the vocabulary for each Q head and its frozen target;
    h -> 1 for the score of a reward model."""
    hidden = run.shape.hidden_size
    first = 2 * hidden * (hidden + 1)
    value = (first + 2 * hidden + 1 if run.needs.value_head else 0) + hidden * run.needs.score_head
    q = run.needs.q_heads * (first + (2 * hidden + 1) * run.vocab_part)
    return value + 2 * q, value + q
