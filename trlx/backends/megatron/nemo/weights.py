"""Reads and writes the models of `.nemo` archives, whose parallel sizes may differ from those of the run.

Weights are joined from the archive's ranks one at a time, when they are read (see ``mapping``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.families import TRAINING_ONLY, decoder_config_of, find_hf_config
from trlx.backends.megatron.mapping import EMBEDDING, MEGATRON, VOCAB_DIVISOR, Entry, Read, entries, padded_vocab
from trlx.backends.megatron.nemo.archive import CONFIG_FILE, WEIGHTS_FILE, Archive, Rank, opened, write_archive
from trlx.backends.megatron.nemo.config import read_config, warn_of_unknown, write_config
from trlx.backends.megatron.nemo.names import Shard, in_stage, layer_of, nemo_name
from trlx.backends.megatron.weights import InMemory, TensorSource
from trlx.models.policy import HEADS_FILE

HF_CONFIG = "config.json"
POSITIONS, HEAD = "embedding.position_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class NemoModel:
    """The model in an archive."""

    decoder: DecoderConfig
    config: PretrainedConfig | None
    """`decoder` as a configuration of transformers; None: transformers has no such architecture."""
    tensors: TensorSource
    """Weights by their names in transformers; without a `config`, by the names of the family ``MEGATRON``."""
    heads: TensorSource | None
    dtype: torch.dtype

    @property
    def family(self) -> str:
        """The family whose tensor names are used."""
        return family_of(self.config)


def family_of(config: PretrainedConfig | None) -> str:
    """The family whose tensor names a model with this configuration has."""
    return MEGATRON if config is None else config.model_type


def is_nemo(path: str | Path) -> bool:
    """Whether `path` is a `.nemo` file or a folder with its config or weights."""
    path = Path(path)
    if not path.is_dir():
        return path.suffix == ".nemo"
    return any((path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)) or any(
        path.glob(f"*_rank_*/{WEIGHTS_FILE}")
    )


def open_nemo(path: str | Path, tokens: int | None = None, changes: Mapping[str, Any] | None = None) -> NemoModel:
    """The GPT model in a `.nemo` file or in the folder it was unpacked into.

    Args:
        tokens: number of tokens, if the archive does not say it; None: all rows of the embedding.
        changes: values of the run's ``model`` section, which replace the archive's if the weights still fit. They
            replace a missing ``model_config.yaml`` if they describe a model.

    Raises:
        FileNotFoundError: the archive or its config does not exist.
        ValueError: the archive does not hold a whole GPT model that is supported; the message says what is wrong.
    """
    describes = changes is not None and "num_layers" in changes
    with opened(path, changes if describes else None) as archive:
        where = str(archive.source)
        config = _model_section(archive.config)
        stages = _stages(archive, config)
        config = _with_sizes_of_weights(config, stages)
        decoder = read_config(config, where, changes)
        warn_of_unknown(config, where)
        decoder = dataclasses.replace(decoder, vocab_size=_tokens(decoder.vocab_size, stages, tokens, where))
        hf_config = _hf_config(archive, decoder)
        decoder = _with_embedding_dropout(decoder, hf_config)
        heads = InMemory(load_file(archive.file(HEADS_FILE)), where) if HEADS_FILE in archive.names else None
        tensors = NemoTensors(stages, decoder, family_of(hf_config), where)
        return NemoModel(decoder, hf_config, tensors, heads, stages[0][0].read(EMBEDDING, "meta").dtype)


def write_nemo(
    path: str | Path,
    decoder: DecoderConfig,
    read: Read,
    family: str,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    files: Mapping[str, Path | bytes] | None = None,
) -> None:
    """Writes a model as a `.nemo` archive for `tensor` x `pipeline` ranks, with Megatron-Core's names.

    Args:
        read: from a name of `family` to a tensor. One rank's tensors are in memory at a time.
        files: the tokenizer's and other files, by their names in the archive.

    Raises:
        ValueError: NeMo has no key for a field of the decoder, or the sizes do not divide it.
    """
    if decoder.num_layers % pipeline:
        raise ValueError(f"{decoder.num_layers} layers cannot be divided evenly over {pipeline} pipeline ranks")
    rows = padded_vocab(decoder.vocab_size, VOCAB_DIVISOR * tensor)
    found = entries(decoder, family, rows)
    dtype = read(found[EMBEDDING].hf_names[0])[:1].dtype
    config = write_config(decoder, tensor=tensor, pipeline=pipeline, rows=rows, divisor=VOCAB_DIVISOR, dtype=dtype)
    files = files or {}
    config["tokenizer"] = _tokenizer(files)
    write_archive(path, config, _Ranks(found, decoder, read, tensor, pipeline), files)


class NemoTensors:
    """The weights of an archive, joined from its ranks when they are read.

    Args:
        stages: for each pipeline stage its shards, in the order of tensor ranks.
        family: the family whose names the weights get.

    Raises:
        ValueError: a weight is missing, unused or of another shape than the config says.
    """

    def __init__(self, stages: list[list[Shard]], decoder: DecoderConfig, family: str, where: str):
        self.where = where
        self._stages, self._decoder = stages, decoder
        self._entries = entries(decoder, family, _rows(stages))
        self._firsts = _firsts(stages)
        _check_layers(self._firsts[-1], decoder, where)
        owners = [(name, owner) for owner, entry in self._entries.items() for name in entry.hf_names]
        # a tied model's output layer comes last and has the embedding's name: keep the first owner
        self._owners = dict(reversed(owners))
        self._check()
        self._latest: tuple[str, dict[str, Tensor]] = ("", {})

    def names(self) -> Iterable[str]:
        return self._owners.keys()

    def read(self, name: str) -> Whole:
        return Whole(self._entries[self._owners[name]].hf_shapes[name], partial(self._tensor, name))

    def _tensor(self, name: str) -> Tensor:
        owner = self._owners[name]
        if self._latest[0] != owner:  # queries, keys and values are read one after the other
            self._latest = (
                owner,
                self._entries[owner].whole([shard.read(local) for shard, local in self._shards(owner)]),
            )
        return self._latest[1][name]

    def _shards(self, name: str) -> list[tuple[Shard, str]]:
        """(shard, the weight's name in it) of every tensor rank."""
        stage = self._stage(name)
        return [(shard, in_stage(name, self._firsts[stage])) for shard in self._stages[stage]]

    def _stage(self, name: str) -> int:
        layer = layer_of(name)
        if layer is not None:
            return max(stage for stage, first in enumerate(self._firsts[:-1]) if first <= layer)
        return 0 if name.startswith("embedding.") else len(self._stages) - 1

    def _check(self) -> None:
        used: dict[int, set[str]] = {id(shard): set() for stage in self._stages for shard in stage}
        for name, entry in self._entries.items():
            if name == HEAD and self._decoder.tied:
                self._check_copy(used)
                continue
            expected = _shard_shape(entry, len(self._stages[0]))
            for shard, local in self._shards(name):
                self._check_weight(name, shard, local, expected)
                used[id(shard)] |= set(shard.needs(local))
        for shard in (shard for stage in self._stages for shard in stage):
            _refuse_unused(shard, used[id(shard)], self.where)

    def _check_weight(self, name: str, shard: Shard, local: str, expected: torch.Size) -> None:
        if not shard.needs(local):
            raise ValueError(f"{self.where} has no {name}, which a model of its {CONFIG_FILE} needs")
        try:
            got = shard.read(local, "meta").shape
        except RuntimeError as error:
            raise ValueError(
                f"{shard.theirs[local]} in {self.where} does not fit its {CONFIG_FILE}: {error}"
            ) from error
        if got != expected:
            raise ValueError(
                f"{shard.theirs[local]} in {self.where} is {list(got)}, but by its {CONFIG_FILE} it is {list(expected)}"
            )

    def _check_copy(self, used: dict[int, set[str]]) -> None:
        """Checks that the last stage's copy of a tied embedding equals it."""
        for first, last in zip(self._stages[0], self._stages[-1], strict=True):
            if not last.needs(HEAD):
                continue
            used[id(last)].add(HEAD)
            if not torch.equal(first.read(EMBEDDING), last.read(HEAD)):
                raise ValueError(
                    f"{last.theirs[HEAD]} in {self.where} differs from the embedding, but its {CONFIG_FILE} says "
                    "share_embeddings_and_output_weights: set it to false there"
                )


class Whole:
    """A tensor whose shards are joined when it is indexed."""

    def __init__(self, shape: tuple[int, ...], read: Any):
        self._shape, self._read = shape, read

    def get_shape(self) -> list[int]:
        """Its shape. Reads no values."""
        return list(self._shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]


class _Ranks(Mapping[Rank, Mapping[str, Tensor]]):
    """The weights of every rank of an archive, made on access."""

    def __init__(self, found: Mapping[str, Entry], decoder: DecoderConfig, read: Read, tensor: int, pipeline: int):
        self._found, self._decoder, self._read = found, decoder, read
        self._tensor, self._pipeline = tensor, pipeline

    def __len__(self) -> int:
        return self._tensor * self._pipeline

    def __iter__(self) -> Iterator[Rank]:
        return ((t, p) for t in range(self._tensor) for p in range(self._pipeline))

    def __getitem__(self, rank: Rank) -> dict[str, Tensor]:
        t, stage = rank
        layers = self._decoder.num_layers // self._pipeline
        return {
            nemo_name(in_stage(name, stage * layers)): entry.shard(self._read, t, self._tensor)
            for name, entry in self._found.items()
            if self._is_on(stage, name, layers)
        }

    def _is_on(self, stage: int, name: str, layers: int) -> bool:
        if name == HEAD and self._decoder.tied and self._pipeline == 1:
            return False  # one stage uses the embedding itself
        layer, last = layer_of(name), self._pipeline - 1
        home = (0 if name.startswith("embedding.") else last) if layer is None else layer // layers
        return stage == home


def _model_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the model, which in a training's config file is its ``model`` section."""
    return config["model"] if isinstance(config.get("model"), Mapping) else config


def _stages(archive: Archive, config: Mapping[str, Any]) -> list[list[Shard]]:
    tensor, pipeline = archive.parallel_sizes()
    heads = config.get("num_attention_heads")
    is_legacy = config.get("megatron_legacy") is True and config.get("mcore_gpt") is not True
    groups = heads // tensor if is_legacy and isinstance(heads, int) and heads >= tensor else None
    stages = [[Shard(archive.weights(t, p), groups) for t in range(tensor)] for p in range(pipeline)]
    if EMBEDDING not in stages[0][0].theirs:
        raise ValueError(f"{archive.source} is not a GPT model of NeMo 1.x: it has no {EMBEDDING} under any known name")
    return stages


def _with_sizes_of_weights(config: Mapping[str, Any], stages: list[list[Shard]]) -> dict[str, Any]:
    """The config with the number of learned positions in the weights: NeMo's versions use two different keys for it."""
    if POSITIONS not in stages[0][0].theirs:
        return dict(config)
    return {**config, "max_position_embeddings": len(stages[0][0].read(POSITIONS, "meta"))}


def _rows(stages: list[list[Shard]]) -> int:
    return sum(len(shard.read(EMBEDDING, "meta")) for shard in stages[0])


def _tokens(said: int | None, stages: list[list[Shard]], tokens: int | None, where: str) -> int:
    rows = _rows(stages)
    if said is not None and said > rows:
        raise ValueError(f"{where} has embeddings of {rows} tokens, but its {CONFIG_FILE} says vocab_size {said}")
    return said or min(rows, tokens or rows)


def _firsts(stages: list[list[Shard]]) -> list[int]:
    """The number of each stage's first layer, and the number of layers at the end."""
    found = [0]
    for shards in stages:
        found.append(found[-1] + shards[0].layers)
    return found


def _check_layers(found: int, decoder: DecoderConfig, where: str) -> None:
    if found != decoder.num_layers:
        raise ValueError(f"{where} has {found} layers, but its {CONFIG_FILE} says num_layers {decoder.num_layers}")


def _shard_shape(entry: Entry, size: int) -> torch.Size:
    """The shape of one of `size` shards."""
    return entry.shard(lambda name: torch.empty(entry.hf_shapes[name], device="meta"), 0, size).shape


def _refuse_unused(shard: Shard, used: set[str], where: str) -> None:
    # some converters gave every norm a bias of zeros, which NeMo ignores
    unused = [
        name for name in shard.theirs.keys() - used if not (name.endswith(".bias") and not shard.read(name).any())
    ]
    if unused:
        named = ", ".join(sorted(shard.theirs[name] for name in unused)[:3])
        raise ValueError(f"{where} has {named}, which a model of its {CONFIG_FILE} does not use")


def _hf_config(archive: Archive, decoder: DecoderConfig) -> PretrainedConfig | None:
    """The archive's ``config.json`` if it describes the same decoder; else a new one, without special tokens."""
    if HF_CONFIG in archive.names:
        config = AutoConfig.from_pretrained(archive.file(HF_CONFIG))
        same = {name: getattr(decoder, name) for name in TRAINING_ONLY}
        if dataclasses.replace(decoder_config_of(config), **same) == decoder:
            return config
    return find_hf_config(decoder)


def _with_embedding_dropout(decoder: DecoderConfig, config: PretrainedConfig | None) -> DecoderConfig:
    """NeMo has one dropout for embeddings and blocks; the archive's ``config.json`` may have two."""
    if config is None or (said := decoder_config_of(config)).hidden_dropout != decoder.hidden_dropout:
        return decoder
    return dataclasses.replace(decoder, embedding_dropout=said.embedding_dropout)


def _tokenizer(files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """The ``tokenizer`` section for these files."""
    section: dict[str, Any] = dict.fromkeys(("library", "type", "model", "vocab_file", "merge_file"))
    if "tokenizer.model" in files:
        return section | {"library": "sentencepiece", "model": "nemo:tokenizer.model"}
    if {"vocab.json", "merges.txt"} <= files.keys():
        of_gpt2 = {"vocab_file": "nemo:vocab.json", "merge_file": "nemo:merges.txt"}
        return section | {"library": "megatron", "type": "GPT2BPETokenizer"} | of_gpt2
    if "tokenizer.json" in files:
        return section | {"library": "huggingface", "model": "nemo:tokenizer.json"}
    return section


def is_companion(name: str) -> bool:
    """Whether a file beside the weights belongs to the model: ``config.json``, the tokenizer's files, the heads."""
    if name == HEADS_FILE:
        return True
    ends = (".json", ".txt", ".model", ".jinja")
    return "/" not in name and name.endswith(ends) and not name.endswith(".index.json")
