"""Hugging Face weights on disk and in memory, read slice by slice and written file by file.

No process ever holds more of a model than it asks for: safetensors files are read at the places that count, and what is
written waits in memory only until there is a file of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trlx.backends.megatron.mapping import Entry, Read, Slice
from trlx.data.hub import first_line

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class TensorSource(Protocol):
    """Named tensors that can be read in slices."""

    where: str
    """What error messages call it."""

    def names(self) -> Iterable[str]:
        """All tensors there are."""

    def read(self, name: str) -> Slice:
        """The tensor of that name."""


def open_tensors(model: str | Path | PreTrainedModel, revision: str | None = None) -> TensorSource:
    """The weights of a model: in a folder of safetensors files, on the Hugging Face hub, or in memory.

    Raises:
        OSError: there is no such folder, nor a model of that name that can be reached or is cached.
        ValueError: the weights there are not in safetensors files, or files that their index names are missing.
    """
    if isinstance(model, PreTrainedModel):
        return InMemory(model.state_dict(), f"the {type(model).__name__} in memory")
    folder = Path(model)
    return Folder(folder if folder.is_dir() else _downloaded(str(model), revision))


def checked_reader(source: TensorSource, entries: Mapping[str, Entry]) -> Read:
    """Gives the tensors that `entries` are made of by their names there, whatever `source` calls them.

    Files of old and of other versions of transformers, and of models without an output head, have slightly different
    names, and constants among the weights. These are understood; that all of the rest fits is checked before a value
    is read.

    Args:
        entries: those of the whole model.

    Raises:
        ValueError: tensors are missing, have another shape, or would not be used; the message names them.
    """
    wanted = {name: shape for entry in entries.values() for name, shape in entry.hf_shapes.items()}
    located = _located(source, wanted)
    for name, shape in wanted.items():
        got = tuple(_shape(source.read(located[name])))
        if got != shape:
            raise ValueError(
                f"{located[name]} in {source.where} is {list(got)}, but a model of this configuration has {list(shape)}"
            )
    # what stands for the head in a tied model is the embedding
    _refuse_unused(source, set(located.values()), located[entries["output_layer.weight"].hf_names[0]])
    return lambda name: source.read(located[name])


def load_weights(
    parameters: Iterable[tuple[str, Tensor]],
    entries: Mapping[str, Entry],
    source: TensorSource,
    tensor_rank: int = 0,
    tensor_size: int = 1,
) -> None:
    """Fills `parameters`, named as in `entries`, with this tensor rank's parts, one at a time, in their own types.

    Raises:
        ValueError: `source` does not fit `entries` (see `checked_reader`), or a parameter is none of them or has
            another shape than its part.
    """
    read = checked_reader(source, entries)
    for name, parameter in parameters:
        if name not in entries:
            raise ValueError(f"The model has a weight {name} that no Hugging Face tensor belongs to")
        shard = entries[name].shard(read, tensor_rank, tensor_size)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{name} is {list(parameter.shape)} here, but rank {tensor_rank} of {tensor_size} gets "
                f"{list(shard.shape)} of {', '.join(entries[name].hf_names)}"
            )
        with torch.no_grad():
            parameter.copy_(shard)


class Folder:
    """The safetensors files of a folder, one or several with an index, opened as they are needed."""

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)
        self._files = _files_of(folder)
        self._open: dict[str, safe_open] = {}

    def names(self) -> Iterable[str]:
        return self._files.keys()

    def read(self, name: str) -> Slice:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file].get_slice(name)


class InMemory:
    """Tensors by name."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str):
        self.tensors, self.where = tensors, where

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def read(self, name: str) -> Slice:
        return self.tensors[name]


class ShardWriter:
    """Writes tensors into ``model-<part>-<number>.safetensors``, a new file whenever `max_bytes` are together.

    Every process that writes has a `part` of its own. Where all are done, one of them calls `write_index`.
    """

    def __init__(self, folder: Path, shard: str, max_bytes: int = 5 * 2**30):
        self.folder, self.shard, self.max_bytes = folder, shard, max_bytes
        self._waiting: dict[str, Tensor] = {}
        self._written: dict[str, tuple[str, int]] = {}
        self._number = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes copies of `tensors`, on any device, under their Hugging Face names."""
        for name, tensor in tensors.items():
            waiting = sum(each.nbytes for each in self._waiting.values())
            if self._waiting and waiting + tensor.nbytes > self.max_bytes:
                self._write()
            self._waiting[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

    def close(self) -> dict[str, tuple[str, int]]:
        """Writes what is left. Returns for every tensor its file and its size in bytes: what `write_index` takes."""
        if self._waiting:
            self._write()
        return self._written

    def _write(self) -> None:
        self._number += 1
        file = f"model-{self.shard}-{self._number:05d}.safetensors"
        save_file(self._waiting, self.folder / file, metadata={"format": "pt"})
        self._written |= {name: (file, tensor.nbytes) for name, tensor in self._waiting.items()}
        self._waiting = {}


def write_index(folder: Path, written: Iterable[Mapping[str, tuple[str, int]]]) -> None:
    """Writes the index that makes one model of the files of several writers, from what their `close` returned.

    A ``model.safetensors`` from before is removed, as loaders would prefer it.

    Raises:
        ValueError: two writers wrote a tensor of one name.
    """
    homes: dict[str, str] = {}
    total = 0
    for contents in written:
        for name, (file, size) in contents.items():
            if name in homes:
                raise ValueError(f"{name} was written twice, into {homes[name]} and {file}")
            homes[name], total = file, total + size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / SINGLE_FILE).unlink(missing_ok=True)


HEADS = ("lm_head.weight", "embed_out.weight")
"""Names of the output head; GPT-NeoX has one in files and the other in memory."""

BASES = ("transformer.", "model.", "gpt_neox.")
"""What stands before every name but the head's; left out where a model was saved without a head."""

CONSTANTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
"""Ends of names under which old files keep what is computed today."""


def _located(source: TensorSource, wanted: Iterable[str]) -> dict[str, str]:
    """For each wanted name the one that `source` has for it."""
    names = set(source.names())
    located = {name: next((each for each in _spellings(name) if each in names), None) for name in wanted}
    missing = [name for name, found in located.items() if found is None]
    if missing:
        raise ValueError(f"{source.where} has no {_listed(missing)}, which a model of this configuration needs")
    return {name: found for name, found in located.items() if found is not None}


def _spellings(name: str) -> Iterable[str]:
    yield name
    if name in HEADS:
        yield from HEADS
    for base in BASES:
        if name.startswith(base):
            yield name.removeprefix(base)


def _refuse_unused(source: TensorSource, used: set[str], head: str) -> None:
    unused = [name for name in source.names() if name not in used and not name.endswith(CONSTANTS)]
    others = [name for name in unused if name not in HEADS]
    if others:
        raise ValueError(f"{source.where} has {_listed(others)}, which no model of this configuration uses")
    for name in unused:
        # a tied model needs no head of its own, but many were saved with one
        if not _same(source, name, head):
            raise ValueError(
                f"{name} in {source.where} is not {head}, though its config.json says tie_word_embeddings: set it to "
                "false there"
            )


def _same(source: TensorSource, one: str, other: str) -> bool:
    a, b = source.read(one), source.read(other)
    return tuple(_shape(a)) == tuple(_shape(b)) and torch.equal(a[:], b[:])


def _shape(tensor: Slice) -> Iterable[int]:
    return tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape()


def _files_of(folder: Path) -> dict[str, str]:
    """Which file each tensor is in."""
    if (folder / SINGLE_FILE).is_file():
        with safe_open(folder / SINGLE_FILE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        found = "only pickled weights" if list(folder.glob("pytorch_model*.bin")) else "no weights"
        raise ValueError(
            f"There are {found} in {folder}: {SINGLE_FILE} or {INDEX_FILE} is needed. transformers writes them with "
            "from_pretrained(...).save_pretrained(...)"
        )
    files = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
    missing = sorted({file for file in files.values() if not (folder / file).is_file()})
    if missing:
        raise ValueError(f"{folder / INDEX_FILE} names {_listed(missing)}, but there is no such file")
    return files


def _downloaded(name: str, revision: str | None) -> Path:
    # some models are there in a second format of their makers, as large as the first
    patterns = ["config.json", "model*.safetensors", INDEX_FILE]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise OSError(
            f"No model at {name!r}: it is neither a folder with weights, nor the name of a model on the Hugging Face "
            f"hub that can be reached from here or is in the local cache ({first_line(error)})"
        ) from None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
