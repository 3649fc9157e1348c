"""Checkpoints: what a run needs to go on as if it had never stopped, written so that a kill cannot spoil it.

A folder appears under its final name only when everything in it is written. Tensors are safetensors, the rest JSON; no
pickle is read.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE = "trainer_state.json"
TENSORS_FILE = "trainer_state.safetensors"


@contextmanager
def replacing(target: Path, is_main: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` when the block ends well. Called on every process.

    Everything in it is on the disk before it gets its name, and `target` is deleted only after that: a kill or a power
    cut at any instant leaves one of the two whole, see `existing`.
    """
    temporary, old = _beside(target, "writing"), _beside(target, "replaced")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    yield temporary
    barrier()
    # by every process, as only the machine that wrote a file can flush it
    _flush(temporary)
    barrier()
    if is_main:
        if is_checkpoint(target):
            remove(old)
            target.rename(old)
        elif target.exists():
            target.rmdir()
        temporary.rename(target)
        _flush_one(target.parent)
        remove(old)
    barrier()


def check_replaceable(target: Path) -> None:
    """Makes sure that nothing but a checkpoint is lost when `target` is replaced.

    Raises:
        ValueError: there is something else.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_checkpoint(target) or checkpoints(target):
        raise ValueError(
            f"{target} holds other things than one checkpoint, which would be deleted: name a new folder, for example "
            f"{target}-saved"
        )


def make_folder(folder: Path) -> None:
    """Makes a folder that something is saved into, if it is not there.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made a folder to save into ({error.strerror}): name another") from None


def remove(folder: Path) -> None:
    """Deletes a folder, if it is there; a kill on the way leaves nothing under its name."""
    if folder.exists():
        doomed = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".removed", dir=folder.parent)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Clears what killed runs left half done under `folder`; a checkpoint whose successor never came is put back."""
    for path in list(folder.glob(".*checkpoint*.*")):
        target = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if path.name.endswith(".replaced") and is_checkpoint(path) and not target.exists():
            path.rename(target)
        elif path.name.endswith((".replaced", ".writing", ".removed")):
            remove(path)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a whole checkpoint."""
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
    """The checkpoint at `folder`; the one it was about to replace if a kill came between two renames; or None."""
    return next(filter(is_checkpoint, (Path(folder), _beside(Path(folder), "replaced"))), None)


def checkpoints(checkpoint_dir: str | Path) -> list[Path]:
    """The checkpoints ``checkpoint_<step>`` under `checkpoint_dir`, in the order of their steps."""
    steps = {}
    # what was about to be replaced begins with a dot, comes first, and gives way to what replaced it
    for path in sorted(Path(checkpoint_dir).glob("*checkpoint_*")):
        match = re.fullmatch(r"checkpoint_(\d+)|\.checkpoint_(\d+)\.replaced", path.name)
        if match and is_checkpoint(path):
            steps[int(match[1] or match[2])] = path
    return [steps[step] for step in sorted(steps)]


def newest(checkpoint_dir: str | Path) -> Path | None:
    """The checkpoint with the highest step under `checkpoint_dir`, or None."""
    return next(reversed(checkpoints(checkpoint_dir)), None)


def write_state(folder: Path, state: dict[str, Any], run: dict[str, Any]) -> None:
    """Writes a trainer's ``state_dict()``, nested dicts of plain values and tensors, and what identifies the run: its
    config, model, data and number of processes."""
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, tensors, "")
    if tensors:
        save_file(tensors, folder / TENSORS_FILE)
    (folder / STATE_FILE).write_text(json.dumps({"state": plain, "run": run}))


def read_state(folder: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_state` wrote, on request without tensors."""
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
    """The optimizer steps that a checkpoint has behind it."""
    return read_state(folder, tensors=False)[0]["schedule"]["step"]


def write_optimizer(path: Path, state_dict: dict[str, Any]) -> None:
    """An optimizer's ``state_dict()``: tensors by name, numbers and groups as JSON in the file's metadata."""
    tensors, numbers = {}, {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            kind = tensors if isinstance(value, Tensor) else numbers
            kind[f"{index}.{name}"] = value.contiguous() if isinstance(value, Tensor) else value
    save_file(
        tensors, path, metadata={"numbers": json.dumps(numbers), "groups": json.dumps(state_dict["param_groups"])}
    )


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
    """Seeds python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass
class RandomState:
    """The states of every random number generator a run draws from, on one process."""

    python: list[Any]
    numpy: list[Any]
    torch: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls) -> RandomState:
        """The states now."""
        version, internal, gauss = random.getstate()
        name, keys, *rest = np.random.get_state()
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls([version, list(internal), gauss], [name, keys.tolist(), *rest], torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Makes every generator go on from these states."""
        version, internal, gauss = self.python
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = self.numpy
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(self.torch)
        if self.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.cuda)

    def write(self, folder: Path, process: str) -> None:
        """Writes one process's states into a checkpoint."""
        tensors = {"torch": self.torch} | ({} if self.cuda is None else {"cuda": self.cuda})
        others = {"python": json.dumps(self.python), "numpy": json.dumps(self.numpy)}
        save_file(tensors, _random_file(folder, process), metadata=others)

    @classmethod
    def read(cls, folder: Path, process: str) -> RandomState | None:
        """One process's states, or None where the checkpoint has none for it."""
        if not _random_file(folder, process).is_file():
            return None
        with safe_open(_random_file(folder, process), framework="pt") as file:
            others = file.metadata()
            cuda = file.get_tensor("cuda") if "cuda" in file.keys() else None
            return cls(json.loads(others["python"]), json.loads(others["numpy"]), file.get_tensor("torch"), cuda)


@contextmanager
def own_randomness(*seeds: int) -> Iterator[None]:
    """Inside the block random numbers come from `seeds`; after it every generator goes on where it was."""
    outside = RandomState.capture()
    # one number far from those of neighbouring seeds
    seed_everything(random.Random(repr(seeds)).getrandbits(31))
    try:
        yield
    finally:
        outside.restore()


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}"


def _flush(folder: Path) -> None:
    """Has the disk write a folder with all that is in it."""
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    """Has the disk write a file, or which files a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # some network file systems cannot flush a folder
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_file(folder: Path, process: str) -> Path:
    return folder / f"random_state_{process}.safetensors"
