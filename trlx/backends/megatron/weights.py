"""Reads and writes Hugging Face weights, in safetensors files or in memory.

Processes read only their slices of a tensor, and write a file whenever 5 GiB of tensors have been added.
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
    """Named tensors that are read in slices."""

    where: str
    """What error messages call it."""

    def names(self) -> Iterable[str]:
        """Names of all tensors."""

    def read(self, name: str) -> Slice:
        """The tensor of that name."""


def open_tensors(model: str | Path | PreTrainedModel, revision: str | None = None) -> TensorSource:
    """The weights of a model in a folder of safetensors files, on the Hugging Face hub, or in memory.

    Raises:
        OSError: there is no such folder, and no such model on the hub or in its cache.
        ValueError: there are no safetensors files, or files that the index names are missing.
    """
    if isinstance(model, PreTrainedModel):
        return InMemory(model.state_dict(), f"the {type(model).__name__} in memory")
    folder = Path(model)
    return Folder(folder if folder.is_dir() else _downloaded(str(model), revision))


def checked_reader(source: TensorSource, entries: Mapping[str, Entry]) -> Read:
    """A function from a name in `entries` to a tensor of `source`.

    Accepts the names of old versions of transformers and of models without an output head, and ignores constants.
    Checks all names and shapes before any value is read.

    Args:
        entries: those of the whole model.

    Raises:
        ValueError: a tensor is missing, unused or of another shape; the message names it.
    """
    wanted = {name: shape for entry in entries.values() for name, shape in entry.hf_shapes.items()}
    located = _located(source, wanted)
    for name, shape in wanted.items():
        got = tuple(_shape(source.read(located[name])))
        if got != shape:
            raise ValueError(
                f"{located[name]} in {source.where} is {list(got)}, but a model of this configuration has {list(shape)}"
            )
    output = entries.get("output_layer.weight")  # of a tied model it is the embedding
    _refuse_unused(source, set(located.values()), output and located[output.hf_names[0]])
    return lambda name: source.read(located[name])


def load_weights(
    parameters: Iterable[tuple[str, Tensor]],
    entries: Mapping[str, Entry],
    source: TensorSource,
    tensor_rank: int = 0,
    tensor_size: int = 1,
) -> None:
    """Loads this tensor rank's shards into `parameters`, one at a time, in the types of the parameters.

    Raises:
        ValueError: `source` does not fit `entries` (see `checked_reader`), or a parameter has no entry or another shape
            than its shard.
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
    """The safetensors file or files of a folder, opened when they are read."""

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
    """Writes tensors into files ``model-<stage>-<number>.safetensors`` of at most `max_bytes`.

    Every process that writes has its own `stage`. When all are done, one process calls `write_index`.
    """

    def __init__(self, folder: Path, stage: str, max_bytes: int = 5 * 2**30):
        self.folder, self.stage, self.max_bytes = folder, stage, max_bytes
        self._waiting: dict[str, Tensor] = {}
        self._written: dict[str, tuple[str, int]] = {}
        self._number = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds copies of `tensors`, on any device, under their Hugging Face names."""
        for name, tensor in tensors.items():
            waiting = sum(each.nbytes for each in self._waiting.values())
            if self._waiting and waiting + tensor.nbytes > self.max_bytes:
                self._write()
            self._waiting[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

    def close(self) -> dict[str, tuple[str, int]]:
        """Writes the last file. Returns {name: (file, bytes)} for `write_index`."""
        if self._waiting:
            self._write()
        return self._written

    def _write(self) -> None:
        self._number += 1
        file = f"model-{self.stage}-{self._number:05d}.safetensors"
        save_file(self._waiting, self.folder / file, metadata={"format": "pt"})
        self._written |= {name: (file, tensor.nbytes) for name, tensor in self._waiting.items()}
        self._waiting = {}


def write_index(folder: Path, written: Iterable[Mapping[str, tuple[str, int]]]) -> None:
    """Writes the index of all writers' files, from the results of their `close`.

    Removes an old ``model.safetensors``, which loaders would prefer.

    Raises:
        ValueError: two writers wrote the same tensor.
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
"""Names of the output head. GPT-NeoX uses one in files and the other in memory."""

BASES = ("transformer.", "model.", "gpt_neox.")
"""Prefixes of all names but the head's. A model saved without a head has no prefix."""

CONSTANTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
"""Endings of the names of constants in old files."""


def _located(source: TensorSource, wanted: Iterable[str]) -> dict[str, str]:
    """Maps each wanted name to the name in `source`."""
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


def _refuse_unused(source: TensorSource, used: set[str], head: str | None) -> None:
    unused = [name for name in source.names() if name not in used and not name.endswith(CONSTANTS)]
    others = [name for name in unused if name not in HEADS]
    if others:
        raise ValueError(f"{source.where} has {_listed(others)}, which no model of this configuration uses")
    for name in unused if head else ():  # a reward model has no use for an output head
        # many tied models were saved with a copy of the embedding as their head
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
    """Tensor name -> file name."""
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
    # skip weights in other formats, which some models have too
    patterns = ["config.json", "model*.safetensors", INDEX_FILE]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise OSError(
            f"No model at {name!r}: it is not a folder with weights, and the Hugging Face hub and its local cache have "
            f"no such model ({first_line(error)})"
        ) from None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
