"""Reads and writes `.nemo` archives: a tar file with ``model_config.yaml`` and the weights of all ranks.

The format is that of NVIDIA NeMo. With several ranks each has a folder::

    model_config.yaml
    model_weights.ckpt                             tensor parallel 1, pipeline parallel 1
    mp_rank_03/model_weights.ckpt                  tensor parallel only
    tp_rank_03_pp_rank_001/model_weights.ckpt      tensor and pipeline parallel
    0b1c..._tokenizer.model                        files that the config names as "nemo:0b1c..._tokenizer.model"

An archive may be hostile: files are unpacked into a temporary folder only, links are refused, and no code in pickles,
YAML tags or interpolations is run.
"""

from __future__ import annotations

import pickle
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

CONFIG_FILE = "model_config.yaml"
WEIGHTS_FILE = "model_weights.ckpt"

Rank = tuple[int, int]
"""Tensor-parallel rank, pipeline-parallel rank."""

SHARDS = (
    re.compile(WEIGHTS_FILE),
    re.compile(rf"mp_rank_(?P<tp>\d+)/{WEIGHTS_FILE}"),
    re.compile(rf"tp_rank_(?P<tp>\d+)_pp_rank_(?P<pp>\d+)/{WEIGHTS_FILE}"),
)
"""The three forms of a rank's file name."""
REFERENCE = re.compile(r"\$\{\.*[\w\[\].-]+\}")
"""An interpolation of another entry, e.g. ``${model.hidden_size}`` or ``${..seed}``, not ``${function:...}``."""
NOT_WEIGHTS = "_extra_state"
"""Ending of state dict keys that hold settings of NeMo's layers, not parameters."""


@contextmanager
def opened(path: str | Path, config: Mapping[str, Any] | None = None) -> Iterator[Archive]:
    """Opens a `.nemo` file (a tar, also compressed) or the folder it was unpacked into.

    Members of a file are unpacked when they are read, into a temporary folder in ``TMPDIR`` that is removed at the end
    of the block. Weights that were read stay valid.

    Args:
        config: replaces a missing ``model_config.yaml``; None: read the only YAML file instead.

    Raises:
        FileNotFoundError: `path` does not exist, or has no config.
        ValueError: the file is not a tar, is truncated, or has a link, a device or a member outside the archive.
    """
    path = Path(path)
    if path.is_dir():
        files = (file for depth in ("*", "*/*") for file in path.glob(depth) if file.is_file())
        yield Archive(path, path, {file.relative_to(path).as_posix() for file in files}, path.joinpath, config)
        return
    if not path.exists():
        raise FileNotFoundError(f"There is no .nemo file or folder at {path}")
    with _open_tar(path) as tar, TemporaryDirectory(prefix="nemo-archive-") as temporary:
        members, folder = _members(tar, path), Path(temporary)
        yield Archive(path, folder, members, partial(_unpacked, tar, members, folder), config)


def write_archive(
    path: str | Path,
    config: Mapping[str, Any],
    weights: Mapping[Rank, Mapping[str, Tensor]],
    files: Mapping[str, Path | bytes] | None = None,
) -> None:
    """Writes a `.nemo` file as NeMo does: a plain tar. Replaces `path` when the file is complete.

    Call it on one process. Equal models give equal bytes.

    Args:
        config: the content of ``model_config.yaml``.
        weights: parameters by name, for every (tensor rank, pipeline rank). Ranks are read one after the other, so a
            mapping may load them on demand.
        files: more files by their names in the archive, such as the tokenizer's.

    Raises:
        ValueError: a rank is missing, or a file's name is taken or leads out of the archive.
    """
    path = Path(path)
    names = _shard_names(weights.keys(), path)
    extra = {_safe_name(name, path): content for name, content in (files or {}).items()}
    if taken := extra.keys() & {CONFIG_FILE, *names.values()}:
        raise ValueError(
            f"{path} cannot hold the extra files {sorted(taken)}: the archive's own files have these names"
        )
    temporary = path.parent / f".{path.name}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with tarfile.open(temporary / "archive", "w:") as tar:
            _add(tar, CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode())
            for name, content in extra.items():
                _add(tar, name, content)
            for rank, name in names.items():
                torch.save(_compact(weights[rank]), temporary / WEIGHTS_FILE)
                _add(tar, name, temporary / WEIGHTS_FILE)
        (temporary / "archive").replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Archive:
    """The config, the weights and the files of an archive.

    Raises:
        FileNotFoundError: the config is missing.
        ValueError: the config is not plain YAML with keys and values.
    """

    def __init__(
        self,
        source: Path,
        folder: Path,
        names: Collection[str],
        fetch: Callable[[str], Path],
        config: Mapping[str, Any] | None = None,
    ):
        self.source = source
        """The path of the archive."""
        self.folder = folder
        """The folder of its unpacked files."""
        self.names = names
        """Names of its files, relative to its root."""
        self._fetch = fetch
        is_given = config is not None and CONFIG_FILE not in names
        self.config: dict[str, Any] = dict(config) if is_given else _read_config(self.file(self._config_file()), source)
        """``model_config.yaml``, with interpolations of existing entries resolved."""

    def file(self, name: str) -> Path:
        """The path of a file of the archive; `name` may begin with ``nemo:``, as in configs.

        Raises:
            FileNotFoundError: there is no such file.
        """
        name = name.removeprefix("nemo:")
        if name not in self.names:
            raise FileNotFoundError(f"{self.source} has no {name}: it holds {', '.join(sorted(self.names)[:20])}")
        return self._fetch(name)

    def _config_file(self) -> str:
        # CarperAI's Llama converter wrote megatron_<name>.yaml
        found = [name for name in self.names if re.fullmatch(r"[^/]+\.ya?ml", name)]
        return found[0] if len(found) == 1 else CONFIG_FILE

    def parallel_sizes(self) -> tuple[int, int]:
        """(tensor parallel size, pipeline parallel size) of the weights.

        Raises:
            ValueError: weights are missing.
        """
        return _sizes(self._shards().keys())

    def weights(self, tp_rank: int = 0, pp_rank: int = 0) -> dict[str, Tensor]:
        """One rank's parameters by name, on the CPU, memory-mapped if the file is a zip.

        Raises:
            ValueError: the rank has no weights, or they are not a dict of tensors.
        """
        shards = self._shards()
        if (tp_rank, pp_rank) not in shards:
            tp, pp = _sizes(shards.keys())
            raise ValueError(
                f"{self.source} has weights of {tp} tensor-parallel and {pp} pipeline-parallel ranks, counted from 0, "
                f"but not of tensor rank {tp_rank} with pipeline rank {pp_rank}"
            )
        return _read_weights(self.file(shards[tp_rank, pp_rank]), shards[tp_rank, pp_rank], self.source)

    def _shards(self) -> dict[Rank, str]:
        kinds = [{_rank(m): m[0] for name in self.names if (m := kind.fullmatch(name))} for kind in SHARDS]
        present = [shards for shards in kinds if shards]
        if not present and any(name.startswith("model_weights/") for name in self.names):
            raise ValueError(
                f"The weights in {self.source} are a distributed checkpoint (a folder model_weights/), which trlx "
                f"cannot read: save the model with NeMo as {WEIGHTS_FILE}, one file for each rank"
            )
        if len(present) != 1:
            found = "weights under more than one form of name" if present else f"no {WEIGHTS_FILE}"
            raise ValueError(f"{self.source} holds {found}: it must have one of the forms {_forms()}")
        _check_complete(present[0].keys(), self.source)
        return present[0]


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is not a .nemo file: it is not a tar archive ({error})") from error


def _members(tar: tarfile.TarFile, path: Path) -> dict[str, tarfile.TarInfo]:
    """The files in a tar by their names. One suspicious member makes the whole archive refused."""
    try:
        members = tar.getmembers()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    for member in members:
        if not (member.isreg() or member.isdir()):
            kind = "a link" if member.islnk() or member.issym() else "a device or another special file"
            raise ValueError(f"{path} was refused: its member {member.name!r} is {kind}, not a file or folder")
    named = {_safe_name(member.name, path): member for member in members}
    return {name: member for name, member in named.items() if member.isreg()}


def _safe_name(name: str, path: Path) -> str:
    """The name without ``./``. Windows' rules find drive letters and both kinds of separators."""
    parts = PureWindowsPath(name)
    if parts.anchor or ".." in parts.parts:
        raise ValueError(f"{path} was refused: the name {name!r} leads out of the archive")
    return parts.as_posix()


def _unpacked(tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], folder: Path, name: str) -> Path:
    target = folder / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tar.extractfile(members[name]) as source, target.open("xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    return target


def _read_config(file: Path, source: Path) -> dict[str, Any]:
    content = BytesIO(file.read_bytes())
    try:
        tree = OmegaConf.load(content)  # builds no objects from tags, and reads 1e-5 as a number
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{CONFIG_FILE} of {source} was refused: it has a tag or key that plain YAML does not have: {error}"
        ) from error
    except (
        yaml.YAMLError,
        OmegaConfBaseException,
        OSError,
    ) as error:  # OSError: a number or date instead of a container
        raise ValueError(f"{CONFIG_FILE} of {source} is not a YAML file of keys with values: {error}") from error
    if not OmegaConf.is_dict(tree):
        raise ValueError(f"{CONFIG_FILE} of {source} must hold keys with values, not a list")
    raw = OmegaConf.to_container(tree, resolve=False)
    return _resolved(raw, OmegaConf.create(_without_calls(raw)))


def _without_calls(node: Any) -> Any:
    """The config with "???", OmegaConf's missing value, in place of strings that could call a function."""
    if isinstance(node, dict):
        return {key: _without_calls(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_calls(value) for value in node]
    calls = isinstance(node, str) and "${" in REFERENCE.sub("", node)
    return "???" if calls else node


def _resolved(node: Any, tree: Any) -> Any:
    """`node` with interpolations resolved in `tree`. Those that lead nowhere stay as written."""
    if isinstance(node, dict):
        return {key: _resolved_entry(value, tree, key) for key, value in node.items()}
    return [_resolved_entry(value, tree, index) for index, value in enumerate(node)]


def _resolved_entry(value: Any, tree: Any, key: Any) -> Any:
    if isinstance(value, (dict, list)):
        return _resolved(value, tree[key])
    if not isinstance(value, str) or "${" not in value:
        return value
    try:
        if OmegaConf.is_config(found := tree[key]):
            return OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
        return found
    except (OmegaConfBaseException, RecursionError):  # RecursionError: two sections refer to each other
        return value


def _read_weights(file: Path, name: str, source: Path) -> dict[str, Tensor]:
    try:
        # files of torch before 1.6 are not zip files and cannot be memory-mapped
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{name} in {source} was refused: it is damaged, or holds other objects than tensors, which could run "
            "code: save it again with torch.save(model.state_dict(), ...)"
        ) from error
    if not isinstance(weights, dict):
        raise ValueError(f"{name} in {source} holds a {type(weights).__name__}, not a dict of parameters by name")
    weights = {key: value for key, value in weights.items() if not str(key).endswith(NOT_WEIGHTS)}
    if others := [key for key, value in weights.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{name} in {source} must hold tensors only, but {others[:5]} are not")
    return weights


def _rank(match: re.Match[str]) -> Rank:
    groups = match.groupdict()
    return int(groups.get("tp", 0)), int(groups.get("pp", 0))


def _check_complete(ranks: Collection[Rank], path: Path) -> None:
    tp, pp = _sizes(ranks)
    missing = ((t, p) for t in range(tp) for p in range(pp) if (t, p) not in ranks)
    if (first := next(missing, None)) is not None:
        raise ValueError(
            f"{path} must hold {tp} tensor-parallel times {pp} pipeline-parallel ranks, "
            f"but the weights of tensor rank {first[0]} with pipeline rank {first[1]} are missing"
        )


def _sizes(ranks: Collection[Rank]) -> tuple[int, int]:
    return max(tp for tp, _ in ranks) + 1, max(pp for _, pp in ranks) + 1


def _forms() -> str:
    return f"{WEIGHTS_FILE}, mp_rank_00/{WEIGHTS_FILE} ... or tp_rank_00_pp_rank_000/{WEIGHTS_FILE} ..."


def _shard_names(ranks: Collection[Rank], path: Path) -> dict[Rank, str]:
    """Rank -> NeMo's name of its file."""
    if not ranks:
        raise ValueError(f"There are no weights to write into {path}")
    _check_complete(ranks, path)
    tp, pp = _sizes(ranks)
    if pp > 1:
        return {rank: f"tp_rank_{rank[0]:02d}_pp_rank_{rank[1]:03d}/{WEIGHTS_FILE}" for rank in sorted(ranks)}
    return {rank: f"mp_rank_{rank[0]:02d}/{WEIGHTS_FILE}" if tp > 1 else WEIGHTS_FILE for rank in sorted(ranks)}


def _compact(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU. Slices are copied, as torch.save would write their whole storage."""
    tensors = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    return {
        name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        for name, tensor in tensors.items()
    }


def _add(tar: tarfile.TarFile, name: str, content: Path | bytes) -> None:
    """Adds a file without date and owner, so that equal models give equal bytes."""
    info = tarfile.TarInfo(f"./{name}")
    info.size = len(content) if isinstance(content, bytes) else content.stat().st_size
    with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        tar.addfile(info, file)
