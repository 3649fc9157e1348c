"""``trlx convert``: a Hugging Face folder to a `.nemo` archive, or back, or one archive to another."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.families import decoder_config_of, hf_config_of
from trlx.backends.megatron.mapping import Read, entries
from trlx.backends.megatron.nemo.archive import opened
from trlx.backends.megatron.nemo.weights import family_of, is_companion, is_nemo, open_nemo, write_nemo
from trlx.backends.megatron.weights import ShardWriter, checked_reader, open_tensors, write_index

NAMED_BY_NEMO = re.compile(r"^[0-9a-f]{32}_")
"""NeMo puts such a prefix before the names of other files in an archive."""


def convert(source: Path, target: Path, *, tensor: int = 1, pipeline: int = 1, vocab_size: int | None = None) -> None:
    """Writes the model at `source` to `target`: a `.nemo` archive if its name ends so, else a Hugging Face folder.

    The tokenizer's files and trained heads are copied as well. All weights stay bit-equal.

    Args:
        source: a folder that transformers can load, a `.nemo` file, or the folder it was unpacked into.
        tensor, pipeline: ranks that the archive is divided over.
        vocab_size: how many rows of the embedding are tokens, for an archive that does not say it; None: all of them.

    Raises:
        FileExistsError: `target` exists.
        FileNotFoundError: there is no model at `source`.
        ValueError: the other format cannot hold this model, or it cannot be divided so; the message says why.
    """
    if target.exists():
        raise FileExistsError(f"There is something at {target} already: write another name, or remove it")
    if tensor < 1 or pipeline < 1:
        raise ValueError(f"An archive is divided over at least 1 x 1 ranks, not {tensor} x {pipeline}")
    to_archive = target.suffix == ".nemo"
    if not to_archive and (tensor, pipeline) != (1, 1):
        raise ValueError(f"--tensor and --pipeline divide a .nemo archive, and {target} is a folder: leave them out")
    if not to_archive and not is_nemo(source):
        raise ValueError(f"{source} and {target} are both Hugging Face folders; call one of them something.nemo")
    with _opened_model(source, vocab_size) as model:
        if to_archive:
            family = family_of(model.config)
            write_nemo(target, model.shape, model.read, family, tensor=tensor, pipeline=pipeline, files=model.files)
        else:
            _write_folder(target, model)


@dataclass(frozen=True)
class _Model:
    shape: DecoderConfig
    config: PretrainedConfig | None
    read: Read
    files: Mapping[str, Path]


@contextmanager
def _opened_model(source: Path, vocab_size: int | None) -> Iterator[_Model]:
    if not is_nemo(source):
        if not (source / "config.json").is_file():
            raise FileNotFoundError(f"There is no model at {source}: neither a .nemo archive, nor a config.json in it")
        config = AutoConfig.from_pretrained(source)
        shape = decoder_config_of(config)
        read = checked_reader(open_tensors(source), entries(shape, config.model_type))
        yield _Model(shape, config, read, _companions({file.name: file for file in source.iterdir()}))
        return
    found = open_nemo(source, vocab_size)
    read = checked_reader(found.tensors, entries(found.decoder, found.family))
    with opened(source) as archive:
        files = {name: archive.file(name) for name in archive.names if is_companion(name)}
        yield _Model(found.decoder, found.config, read, _companions(files))


def _companions(files: Mapping[str, Path]) -> dict[str, Path]:
    return {NAMED_BY_NEMO.sub("", name): files[name] for name in sorted(files) if is_companion(name)}


def _write_folder(target: Path, model: _Model) -> None:
    config = model.config if model.config is not None else hf_config_of(model.shape)
    temporary = target.parent / f".{target.name}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, file in model.files.items():
            shutil.copyfile(file, temporary / name)
        config.dtype = _write_weights(temporary, model.read, model.shape, config.model_type)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.save_pretrained(temporary)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(folder: Path, read: Read, shape: DecoderConfig, family: str) -> torch.dtype:
    """Writes every tensor once, and returns the dtype of the last one."""
    writer = ShardWriter(folder, "000")
    names = dict.fromkeys(name for entry in entries(shape, family).values() for name in entry.hf_names)
    for name in names:
        tensor = read(name)[:]
        writer.add({name: tensor})
    write_index(folder, [writer.close()])
    return tensor.dtype
