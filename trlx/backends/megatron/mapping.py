"""Maps each weight of Megatron-Core's decoder to Hugging Face tensors, and says how tensor ranks shard it.

Megatron-Core's matrices are [out, in]. Tensor ranks shard QKV and up projections by rows, and output and down
projections by columns. One QKV matrix holds, for each head group, its queries, its key and its value. A gated
feed-forward block has one matrix too: on **each rank**, the gate's rows and then the up projection's.
Hugging Face has separate matrices; GPT-2's are [in, out], and GPT-NeoX's QKV matrix is that of Megatron-Core.

Sharding and joining copy bits and never change values. They work for any tensor of a weight's shape, such as Adam's
moments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from trlx.backends.megatron.decoder_config import DecoderConfig

VOCAB_DIVISOR = 128
"""NeMo's default: the vocabulary is padded to a multiple of this x the tensor parallel size."""


class Slice(Protocol):
    """A tensor, or what safetensors' ``get_slice`` returns: indexing reads the values."""

    def __getitem__(self, index: Any, /) -> Tensor: ...


EMBEDDING = "embedding.word_embeddings.weight"
SCORE = "heads.score.weight"
"""The head of a reward model, by our name. It stands among the weights of the model, as in transformers."""

Read = Callable[[str], Slice]
"""From a Hugging Face name to the tensor."""


class Entry(ABC):
    """One weight of Megatron-Core's model, made of Hugging Face tensors."""

    split_dim: ClassVar[int | None]
    """The dimension that tensor ranks shard; None: replicated."""

    @property
    @abstractmethod
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its Hugging Face tensors."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of its Hugging Face tensors."""
        return tuple(self.hf_shapes)

    @abstractmethod
    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        """The shard of tensor rank `rank` of `size`, as a new tensor. Reads only the values of the shard.

        Raises:
            ValueError: `size` does not divide the weight.
        """

    @abstractmethod
    def whole(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The Hugging Face tensors, from the shards of all tensor ranks in rank order."""


def entries(
    decoder: DecoderConfig, family: str, vocab_rows: int | None = None, scored: bool = False
) -> dict[str, Entry]:
    """All weights of a decoder, by Megatron-Core's name with the layer's number in the whole model.

    `family` decides the Hugging Face names (see ``families``); `MEGATRON` has a name for every weight. The embedding
    has `vocab_rows` rows (see `padded_vocab`); None: one per token. There is always an ``output_layer.weight``: in a
    tied model it maps to the embedding's tensor, as the last pipeline stage has a copy of it, which is not exported.
    Only a reward model (`scored`) has `SCORE` instead.

    Raises:
        ValueError: the family is unknown, or has no name for a weight of this decoder.
    """
    if family not in NAMES:
        raise ValueError(f"There are no weight names for {family!r}; known are {', '.join(NAMES)}")
    names, hidden = NAMES[family], decoder.hidden_size
    rows = decoder.vocab_size if vocab_rows is None else vocab_rows
    found: dict[str, Entry] = {EMBEDDING: Vocabulary(f"{names.embedding}.weight", decoder.vocab_size, hidden, rows)}
    if decoder.position == "learned":
        name = _named(names.position, "learned positions", family)
        table = Replicated(f"{name}.weight", (decoder.max_position_embeddings, hidden))
        found["embedding.position_embeddings.weight"] = table
    for layer in range(decoder.num_layers):
        for name, entry in _layer(decoder, names, names.layer.format(layer), family):
            found[f"decoder.layers.{layer}.{name}"] = entry
    found |= _norm("decoder.final_layernorm", names.final_norm, hidden, decoder)
    if scored:
        return found | {SCORE: Replicated("score.weight", (1, hidden))}
    head = names.embedding if decoder.tied else names.head
    found["output_layer.weight"] = Vocabulary(f"{head}.weight", decoder.vocab_size, hidden, rows)
    return found


def padded_vocab(vocab: int, divisor: int) -> int:
    """`vocab` rounded up to a multiple of `divisor`."""
    return -(-vocab // divisor) * divisor


@dataclass(frozen=True, slots=True)
class Replicated(Entry):
    """A weight that every tensor rank has whole: norms, learned positions, biases of output and down projections."""

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
    """One row per token and padding rows of zeros, sharded by rows."""

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
    """Rows of a Hugging Face tensor. Projections with the same name follow each other in one tensor."""

    name: str
    rows: int


@dataclass(frozen=True, slots=True)
class Rows(Entry):
    """One or more projections in one weight, sharded by rows.

    Each projection is cut into `blocks` blocks of rows. The weight has the first block of every projection, then the
    second of every projection, and so on. Gate and up projections have a block per tensor rank; query, key and value
    projections have a block per head group.
    """

    projections: tuple[Projection, ...]
    width: int | None
    """Columns; None: the weight is a bias."""
    blocks: int | None = None
    """None: one per tensor rank."""
    transposed: bool = False
    """The Hugging Face matrix is [in, out]."""
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
    """A matrix [out, in], sharded by columns."""

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    """The Hugging Face matrix is [in, out]."""
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
    """A family's names of its modules. The prefix of a block's modules is `layer`."""

    embedding: str
    layer: str
    input_norm: str
    qkv: tuple[str, ...]
    """One name: Megatron-Core's QKV matrix. Three: queries, keys, values; the same name three times: one tensor."""
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
    """The matrices of blocks are [in, out]."""


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

MEGATRON = "megatron"
"""The family for decoders without an architecture in transformers: Megatron-Core's names."""

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
    MEGATRON: Names(
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
    module: str, named: Sequence[tuple[str, int]], blocks: int | None, bias: bool, decoder: DecoderConfig, names: Names
) -> Iterator[tuple[str, Entry]]:
    widths = {"weight": decoder.hidden_size} | ({"bias": None} if bias else {})
    for kind, width in widths.items():
        projections = tuple(Projection(f"{name}.{kind}", rows) for name, rows in named)
        yield f"{module}.{kind}", Rows(projections, width, blocks, names.transposed)


def _columns(module: str, name: str, width: int, decoder: DecoderConfig, names: Names) -> Iterator[tuple[str, Entry]]:
    yield f"{module}.weight", Columns(f"{name}.weight", (decoder.hidden_size, width), names.transposed)
    if decoder.bias:
        yield f"{module}.bias", Replicated(f"{name}.bias", (decoder.hidden_size,))


def _norm(module: str, name: str, width: int, decoder: DecoderConfig) -> dict[str, Entry]:
    kinds = ("weight", "bias") if decoder.normalization == "layernorm" else ("weight",)
    return {f"{module}.{kind}": Replicated(f"{name}.{kind}", (width,)) for kind in kinds}


def _named(name: str | None, what: str, family: str) -> str:
    if name is None:
        raise ValueError(f"{family} has no {what}, but this model does: use the family {MEGATRON!r}")
    return name


def _share(total: int, rank: int, size: int, what: str) -> tuple[int, int]:
    if total % size:
        raise ValueError(f"{what[0].upper()}{what[1:]} cannot be divided evenly by {size}")
    each = total // size
    return rank * each, (rank + 1) * each


def _transposed(tensor: Tensor, transposed: bool) -> Tensor:
    return tensor.T if transposed and tensor.dim() == 2 else tensor
