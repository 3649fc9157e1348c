"""Which Hugging Face tensors every weight of the engine's decoder is made of, and how it is divided.

The engine's matrices are [out, in]. Projections that feed heads or feed-forward units are split over tensor ranks by
rows, those behind them by columns. It keeps queries, keys and values in one matrix, head group by head group:
the queries of a group, its key, its value. A gated feed-forward block has gate over up, **rank by rank**. Hugging Face
keeps these apart, or in GPT-2 turned to [in, out], or in GPT-NeoX as the engine does.

Values are only moved, never changed: back and forth through any number of ranks gives the same bits, in every type. So
the entries serve as well for all that has a weight's shape, as an optimizer's moments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from trlx.backends.megatron.decoder_config import DecoderConfig


class Slice(Protocol):
    """A tensor of which parts can be read: what safetensors' ``get_slice`` returns, or a tensor."""

    def __getitem__(self, index: Any, /) -> Tensor: ...


Read = Callable[[str], Slice]
"""Gives a Hugging Face tensor by its name."""


class Entry(ABC):
    """One weight of the engine's model in terms of Hugging Face tensors."""

    split_dim: ClassVar[int | None]
    """The dimension that is divided over tensor ranks; None: every rank has all of it."""

    @property
    @abstractmethod
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the Hugging Face tensors it is made of."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors it is made of."""
        return tuple(self.hf_shapes)

    @abstractmethod
    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        """The part of tensor rank `rank` of `size`: a new tensor, for which no more is read than it needs.

        Raises:
            ValueError: the weight cannot be divided over so many ranks.
        """

    @abstractmethod
    def whole(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The Hugging Face tensors, from the parts of all tensor ranks in rank order."""


def entries(decoder: DecoderConfig, family: str, vocab_rows: int | None = None) -> dict[str, Entry]:
    """All weights of a decoder by the engine's name for them, layers counted over the whole model.

    `family` chooses the Hugging Face names (see ``families``), or is `ENGINE` for names near the engine's own, which
    every shape has. The embedding has `vocab_rows` rows (see `padded_vocab`); None: no more than there are tokens.
    There is always an ``output_layer.weight``. In a tied model it is made of the embedding's tensor: the last of
    several pipeline stages has a copy there, which an export must leave out.

    Raises:
        ValueError: the family is unknown, or has no name for a weight that this shape has.
    """
    if family not in NAMES:
        raise ValueError(f"There are no weight names for {family!r}; known are {', '.join(NAMES)}")
    names, hidden = NAMES[family], decoder.hidden_size
    rows = decoder.vocab_size if vocab_rows is None else vocab_rows
    found: dict[str, Entry] = {
        "embedding.word_embeddings.weight": Vocabulary(f"{names.embedding}.weight", decoder.vocab_size, hidden, rows)
    }
    if decoder.position == "learned":
        name = _named(names.position, "learned positions", family)
        table = Replicated(f"{name}.weight", (decoder.max_position_embeddings, hidden))
        found["embedding.position_embeddings.weight"] = table
    for layer in range(decoder.num_layers):
        for name, entry in _layer(decoder, names, names.layer.format(layer), family):
            found[f"decoder.layers.{layer}.{name}"] = entry
    found |= _norm("decoder.final_layernorm", names.final_norm, hidden, decoder)
    head = names.embedding if decoder.tied else names.head
    found["output_layer.weight"] = Vocabulary(f"{head}.weight", decoder.vocab_size, hidden, rows)
    return found


def padded_vocab(vocab: int, divisor: int) -> int:
    """Rows of an embedding of `vocab` tokens, filled up to a multiple of `divisor`."""
    return -(-vocab // divisor) * divisor


@dataclass(frozen=True, slots=True)
class Replicated(Entry):
    """A weight that every tensor rank has: norms, learned positions, biases that are added after a sum over ranks."""

    name: str
    shape: tuple[int, ...]
    split_dim: ClassVar[int | None] = None

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape}

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        return read(self.name)[:].clone()

    def whole(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.name: shards[0]}


@dataclass(frozen=True, slots=True)
class Vocabulary(Entry):
    """One row per token, filled up with rows of zeros and split by rows."""

    name: str
    tokens: int
    width: int | None
    """Columns; None: the weight is a bias."""
    rows: int
    split_dim: ClassVar[int | None] = 0

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: (self.tokens,) if self.width is None else (self.tokens, self.width)}

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        start, stop = _share(self.rows, rank, size, f"the {self.rows} rows of {self.name}")
        real = read(self.name)[min(start, self.tokens) : min(stop, self.tokens)]
        return torch.cat([real, real.new_zeros(stop - start - len(real), *real.shape[1:])])

    def whole(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.name: torch.cat(list(shards))[: self.tokens].contiguous()}


@dataclass(frozen=True, slots=True)
class Projection:
    """Rows of a Hugging Face tensor; pieces of one name follow each other in it."""

    name: str
    rows: int


@dataclass(frozen=True, slots=True)
class Rows(Entry):
    """A weight split by rows. Each piece is cut into as many blocks of rows; the weight is the first block of every
    piece, then the second of every piece, and so on.

    A plain matrix is one piece; gate and up are two, a block for every tensor rank; queries, keys and values are three,
    a block for every head group.
    """

    projections: tuple[Projection, ...]
    width: int | None
    """Columns; None: the weight is a bias."""
    blocks: int | None = None
    """None: one for every tensor rank."""
    transposed: bool = False
    """Hugging Face keeps the matrix as [in, out]."""
    split_dim: ClassVar[int | None] = 0

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        totals: dict[str, int] = {}
        for projection in self.projections:
            totals[projection.name] = totals.get(projection.name, 0) + projection.rows
        return {name: self._oriented(rows) for name, rows in totals.items()}

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        blocks = self.blocks or size
        first, last = _share(blocks, rank, size, f"the {blocks} head groups of {self.projections[0].name}")
        cut, ends = [], dict.fromkeys(self.hf_shapes, 0)
        for projection in self.projections:
            _share(projection.rows, 0, blocks, f"the {projection.rows} rows of {projection.name}")
            begin, step = ends[projection.name], projection.rows // blocks
            got = self._read(read(projection.name), begin + first * step, begin + last * step)
            cut.append(got.unflatten(0, (last - first, step)))
            ends[projection.name] += projection.rows
        return torch.cat(cut, dim=1).flatten(0, 1)

    def whole(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        blocks = self.blocks or len(shards)
        sizes = [projection.rows // blocks for projection in self.projections]
        cut = [shard.unflatten(0, (blocks // len(shards), sum(sizes))).split(sizes, dim=1) for shard in shards]
        found: dict[str, list[Tensor]] = {}
        for projection, of_ranks in zip(self.projections, zip(*cut, strict=True), strict=True):
            found.setdefault(projection.name, []).extend(each.flatten(0, 1) for each in of_ranks)
        return {name: _transposed(torch.cat(rows), self.transposed).contiguous() for name, rows in found.items()}

    def _read(self, tensor: Slice, start: int, stop: int) -> Tensor:
        if self.transposed and self.width is not None:
            return tensor[:, start:stop].T
        return tensor[start:stop]

    def _oriented(self, rows: int) -> tuple[int, ...]:
        if self.width is None:
            return (rows,)
        return (self.width, rows) if self.transposed else (rows, self.width)


@dataclass(frozen=True, slots=True)
class Columns(Entry):
    """A matrix [out, in] split by columns."""

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    """Hugging Face keeps it as [in, out]."""
    split_dim: ClassVar[int | None] = 1

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape[::-1] if self.transposed else self.shape}

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        start, stop = _share(self.shape[1], rank, size, f"the {self.shape[1]} inputs of {self.name}")
        tensor = read(self.name)
        got = tensor[start:stop].T if self.transposed else tensor[:, start:stop]
        return got.clone(memory_format=torch.contiguous_format)

    def whole(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.name: _transposed(torch.cat(list(shards), dim=1), self.transposed).contiguous()}


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a family calls its modules; those of a block stand behind `layer`."""

    embedding: str
    layer: str
    input_norm: str
    qkv: tuple[str, ...]
    """One name: laid out as in the engine. Three: queries, keys, values, beside each other if it is the same name."""
    attention_output: str
    feedforward_norm: str
    up: str
    down: str
    final_norm: str
    head: str
    position: str | None = None
    gate: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    transposed: bool = False
    """Matrices of blocks are [in, out]."""


_LLAMA = Names(
    embedding="model.embed_tokens",
    layer="model.layers.{}.",
    input_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    attention_output="self_attn.o_proj",
    feedforward_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    final_norm="model.norm",
    head="lm_head",
)

ENGINE = "megatron"
"""The family of every shape: names near the engine's own."""

NAMES = {
    "gpt2": Names(
        embedding="transformer.wte",
        position="transformer.wpe",
        layer="transformer.h.{}.",
        input_norm="ln_1",
        qkv=("attn.c_attn",) * 3,
        attention_output="attn.c_proj",
        feedforward_norm="ln_2",
        up="mlp.c_fc",
        down="mlp.c_proj",
        final_norm="transformer.ln_f",
        head="lm_head",
        transposed=True,
    ),
    "gpt_neox": Names(
        embedding="gpt_neox.embed_in",
        layer="gpt_neox.layers.{}.",
        input_norm="input_layernorm",
        qkv=("attention.query_key_value",),
        attention_output="attention.dense",
        feedforward_norm="post_attention_layernorm",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    ENGINE: Names(
        embedding="embedding.word_embeddings",
        position="embedding.position_embeddings",
        layer="decoder.layers.{}.",
        input_norm="input_layernorm",
        qkv=("self_attention.linear_qkv",),
        q_norm="self_attention.q_layernorm",
        k_norm="self_attention.k_layernorm",
        attention_output="self_attention.linear_proj",
        feedforward_norm="pre_mlp_layernorm",
        gate="mlp.linear_gate",
        up="mlp.linear_fc1",
        down="mlp.linear_fc2",
        final_norm="decoder.final_layernorm",
        head="output_layer",
    ),
}


def _layer(decoder: DecoderConfig, names: Names, prefix: str, family: str) -> Iterator[tuple[str, Entry]]:
    hidden = decoder.hidden_size
    yield from _norm("input_layernorm", prefix + names.input_norm, hidden, decoder).items()
    if decoder.qk_norm:
        for letter, name in (("q", names.q_norm), ("k", names.k_norm)):
            norm = prefix + _named(name, "norms of queries and keys", family)
            yield from _norm(f"self_attention.{letter}_layernorm", norm, decoder.kv_channels, decoder).items()
    qkv = _qkv(decoder, [prefix + name for name in names.qkv])
    yield from _rows("self_attention.linear_qkv", qkv, decoder.num_query_groups, decoder.qkv_bias, decoder, names)
    heads = decoder.num_attention_heads * decoder.kv_channels
    yield from _columns("self_attention.linear_proj", prefix + names.attention_output, heads, decoder, names)
    yield from _norm("pre_mlp_layernorm", prefix + names.feedforward_norm, hidden, decoder).items()
    up = [names.up]
    if decoder.gated:
        up.insert(0, _named(names.gate, "gated feed-forward blocks", family))
    units = decoder.ffn_hidden_size
    yield from _rows("mlp.linear_fc1", [(prefix + name, units) for name in up], None, decoder.bias, decoder, names)
    yield from _columns("mlp.linear_fc2", prefix + names.down, units, decoder, names)


def _qkv(decoder: DecoderConfig, names: Sequence[str]) -> list[tuple[str, int]]:
    heads, groups = (number * decoder.kv_channels for number in (decoder.num_attention_heads, decoder.num_query_groups))
    sizes = [heads, groups, groups] if len(names) == 3 else [heads + 2 * groups]
    return list(zip(names, sizes, strict=True))


def _rows(
    engine: str,
    projections: Sequence[tuple[str, int]],
    blocks: int | None,
    bias: bool,
    decoder: DecoderConfig,
    names: Names,
) -> Iterator[tuple[str, Entry]]:
    for kind, width in (
        (("weight", decoder.hidden_size), ("bias", None)) if bias else (("weight", decoder.hidden_size),)
    ):
        shards = tuple(Projection(f"{name}.{kind}", rows) for name, rows in projections)
        yield f"{engine}.{kind}", Rows(shards, width, blocks, names.transposed)


def _columns(engine: str, name: str, width: int, decoder: DecoderConfig, names: Names) -> Iterator[tuple[str, Entry]]:
    yield f"{engine}.weight", Columns(f"{name}.weight", (decoder.hidden_size, width), names.transposed)
    if decoder.bias:
        yield f"{engine}.bias", Replicated(f"{name}.bias", (decoder.hidden_size,))


def _norm(engine: str, name: str, width: int, decoder: DecoderConfig) -> dict[str, Entry]:
    kinds = ("weight", "bias") if decoder.normalization == "layernorm" else ("weight",)
    return {f"{engine}.{kind}": Replicated(f"{name}.{kind}", (width,)) for kind in kinds}


def _named(name: str | None, what: str, family: str) -> str:
    if name is None:
        raise ValueError(f"{family} has no {what}, which this model has; names that fit every model are {ENGINE!r}")
    return name


def _share(total: int, rank: int, size: int, what: str) -> tuple[int, int]:
    if total % size:
        raise ValueError(f"{what[0].upper()}{what[1:]} cannot be divided evenly by {size}")
    each = total // size
    return rank * each, (rank + 1) * each


def _transposed(tensor: Tensor, transposed: bool) -> Tensor:
    return tensor.T if transposed and tensor.dim() == 2 else tensor
