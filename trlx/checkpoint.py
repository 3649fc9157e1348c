"""Checkpoints: all that a run needs to continue as if it had never stopped.

A folder gets its final name only when everything in it is written, so a kill cannot spoil it. Tensors are safetensors,
the rest is JSON; nothing is a pickle.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trlx.background import Background, Write, postponed, write

STATE_FILE = "trainer_state.json"
TENSORS_FILE = "trainer_state.safetensors"
RANDOM_FILE = "random_state_{}.safetensors"
"""By process."""


@contextmanager
def replacing(
    target: Path, is_main: bool, barrier: Callable[[], None], background: Background | None = None
) -> Iterator[Path]:
    """A temporary folder that replaces `target` when the block ends without an error. Called on every process.

    All its files are flushed to disk before it gets its name, and only then the old `target` is deleted. So a kill or a
    power cut at any time leaves one of the two complete, see `find`.

    With a `background`, the main process's calls of `trlx.background.write` in the block only copy. Its thread writes
    the copies, and then gives the folder its name.
    """
    temporary = _beside(target, "writing")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    in_thread = is_main and background is not None
    with postponed(in_thread) as writes:
        yield temporary
    barrier()
    # on every process, because only the machine that wrote a file can flush it
    if not in_thread:
        _flush(*temporary.rglob("*"), temporary)
    barrier()
    if in_thread:
        background.start(partial(_write_and_name, writes, temporary, target))
    elif is_main:
        _give_name(temporary, target)
    if background is None:
        barrier()


def link(source: Path, target: Path) -> None:
    """Makes `target` a second checkpoint with the files of `source`, which take no more room on the disk."""
    temporary = _beside(target, "writing")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=_link)
    _flush(*temporary.rglob("*"), temporary)
    _give_name(temporary, target)


def _write_and_name(writes: list[Write], temporary: Path, target: Path) -> None:
    while writes:
        writes.pop()()  # each frees its copies
    _flush(*temporary.rglob("*"), temporary)
    _give_name(temporary, target)


def _give_name(temporary: Path, target: Path) -> None:
    """Replaces `target` by `temporary`, whose files are on the disk."""
    old = _beside(target, "replaced")
    if is_checkpoint(target):
        remove(old)
        target.rename(old)
    elif target.exists():
        target.rmdir()
    temporary.rename(target)
    _flush(target.parent)
    remove(old)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # some file systems have no links
        shutil.copy2(source, target)


def check_replaceable(target: Path) -> None:
    """Checks that `target` holds one checkpoint or nothing, since saving replaces it.

    Raises:
        ValueError: it holds something else.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_checkpoint(target) or checkpoints(target):
        raise ValueError(
            f"{target} holds other things than one checkpoint, which would be deleted: name a new folder, for example "
            f"{target}-saved"
        )


def make_folder(folder: Path) -> None:
    """Creates a folder to save into, if it is not there.

    Raises:
        ValueError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be created ({error.strerror}): name another folder to save into") from None


def remove(folder: Path) -> None:
    """Deletes a folder, if it is there. It loses its name first, so a kill leaves no half of it under that name."""
    if folder.exists():
        doomed = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".removed", dir=folder.parent)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Deletes what killed runs left half done in `folder`. A checkpoint without its replacement gets its name back."""
    for path in list(folder.glob(".*checkpoint*.*")):
        target = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if path.name.endswith(".replaced") and is_checkpoint(path) and not target.exists():
            path.rename(target)
        elif path.name.endswith((".replaced", ".writing", ".removed")):
            remove(path)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint."""
    return (folder / STATE_FILE).is_file()


def existing(folder: str | Path) -> Path:
    """The checkpoint at `folder`, see `find`.

    Raises:
        FileNotFoundError: there is none.
    """
    found = find(folder)
    if found is None:
        raise FileNotFoundError(f"No checkpoint at {folder}: {STATE_FILE} is not there")
    return found


def find(folder: str | Path) -> Path | None:
    """The checkpoint at `folder`, or the one that it was replacing when a kill came between two renames, or None."""
    return next(filter(is_checkpoint, (Path(folder), _beside(Path(folder), "replaced"))), None)


def checkpoints(checkpoint_dir: str | Path) -> list[Path]:
    """The checkpoints ``checkpoint_<step>`` in `checkpoint_dir`, sorted by step."""
    steps = {}
    # a replaced checkpoint begins with a dot, so it is sorted first, and its replacement overwrites it here
    for path in sorted(Path(checkpoint_dir).glob("*checkpoint_*")):
        match = re.fullmatch(r"checkpoint_(\d+)|\.checkpoint_(\d+)\.replaced", path.name)
        if match and is_checkpoint(path):
            steps[int(match[1] or match[2])] = path
    return [steps[step] for step in sorted(steps)]


def newest(checkpoint_dir: str | Path) -> Path | None:
    """The checkpoint with the highest step in `checkpoint_dir`, or None."""
    return next(reversed(checkpoints(checkpoint_dir)), None)


def write_state(folder: Path, state: dict[str, Any], run: dict[str, Any]) -> None:
    """Writes a trainer's ``state_dict()`` (nested dicts of JSON values and tensors) and the run's `identity`."""
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, tensors, "")
    if tensors:
        write(partial(save_file, filename=folder / TENSORS_FILE), tensors)
    (folder / STATE_FILE).write_text(json.dumps({"state": plain, "run": run}))


def read_state(folder: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state and the identity that `write_state` wrote; without `tensors`, the state lacks its tensors."""
    saved = json.loads((folder / STATE_FILE).read_text())
    file = folder / TENSORS_FILE
    for name, tensor in (load_file(file) if tensors and file.is_file() else {}).items():
        *outer, last = name.split(".")
        inner = saved["state"]
        for key in outer:
            inner = inner[key]
        inner[last] = tensor
    return saved["state"], saved["run"]


def _without_tensors(state: dict[str, Any], found: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """`state` without its tensors, which go into `found` under dotted names."""
    plain = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value.contiguous()
        else:
            plain[name] = _without_tensors(value, found, f"{prefix}{name}.") if isinstance(value, dict) else value
    return plain


def step_of(folder: Path) -> int:
    """The number of optimizer steps before a checkpoint."""
    return read_state(folder, tensors=False)[0]["schedule"]["step"]


def write_optimizer(path: Path, state_dict: dict[str, Any]) -> None:
    """Writes an optimizer's ``state_dict()``: tensors by name, numbers and groups as JSON in the file's metadata."""
    tensors, numbers = {}, {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            kind = tensors if isinstance(value, Tensor) else numbers
            kind[f"{index}.{name}"] = value.contiguous() if isinstance(value, Tensor) else value
    metadata = {"numbers": json.dumps(numbers), "groups": json.dumps(state_dict["param_groups"])}
    write(partial(save_file, filename=path, metadata=metadata), tensors)


def read_optimizer(path: Path) -> dict[str, Any]:
    """What `write_optimizer` wrote, as a ``state_dict``."""
    with safe_open(path, framework="pt") as file:
        entries = {**json.loads(file.metadata()["numbers"]), **{name: file.get_tensor(name) for name in file.keys()}}
        groups = json.loads(file.metadata()["groups"])
    state: dict[int, dict[str, Any]] = {}
    for key, value in entries.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def seed_everything(seed: int) -> None:
    """Seeds python, numpy, and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RandomState(NamedTuple):
    """The states of all random number generators of one process."""

    python: tuple
    numpy: tuple
    torch: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls) -> RandomState:
        """The present states."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Sets every generator to its state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.cuda)

    def write(self, folder: Path, process: str) -> None:
        """Writes the states of one process into a checkpoint."""
        tensors = {"torch": self.torch} | ({} if self.cuda is None else {"cuda": self.cuda})
        others = {"python": json.dumps(self.python), "numpy": json.dumps(self.numpy, default=np.ndarray.tolist)}
        save_file(tensors, folder / RANDOM_FILE.format(process), metadata=others)

    @classmethod
    def read(cls, folder: Path, process: str) -> RandomState | None:
        """The states of one process, or None if the checkpoint has none for it."""
        path = folder / RANDOM_FILE.format(process)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            version, internal, gauss = json.loads(file.metadata()["python"])
            numpy = tuple(json.loads(file.metadata()["numpy"]))
            cuda = file.get_tensor("cuda") if "cuda" in file.keys() else None
            return cls((version, tuple(internal), gauss), numpy, file.get_tensor("torch"), cuda)


@contextmanager
def own_randomness(*seeds: int) -> Iterator[None]:
    """Inside the block random numbers depend on `seeds` alone; after it every generator continues where it was."""
    outside = RandomState.capture()
    # a hash, so that neighbouring seeds give unrelated numbers
    seed_everything(random.Random(repr(seeds)).getrandbits(31))
    try:
        yield
    finally:
        outside.restore()


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}"


def _flush(*paths: Path) -> None:
    """Makes the disk write files, and the file lists of folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # some network file systems cannot flush a folder
                raise
        finally:
            os.close(descriptor)
