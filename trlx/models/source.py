"""Finds a model's folder and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trlx import logging
from trlx.config import TokenizerConfig
from trlx.data.hub import check_source
from trlx.data.tokenizer import load_tokenizer, read_tokenizer
from trlx.models.adapters import adapted_model

logger = logging.get_logger(__name__)

LOADING = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only")
"""Keys of ``model.model_extra_configs`` that the model's own tokenizer is loaded with too."""
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
"""Every folder with a saved tokenizer has one of these files."""


def exported(model_path: Any) -> Any:
    """The model in a checkpoint of trlx: its ``hf_model``, or ``model.nemo`` in that; else `model_path` itself."""
    if not isinstance(model_path, str):
        return model_path
    model_path = os.path.expanduser(model_path)
    folder, inside = Path(model_path), Path(model_path) / "hf_model"
    if not folder.is_dir():
        return model_path
    folder = inside if inside.is_dir() and not (folder / "config.json").is_file() else folder
    archive = folder / "model.nemo"  # for a model that transformers cannot hold
    return str(archive if archive.is_file() else folder)


def check_model(model_path: Any, where: str, loading: Mapping[str, Any] | None = None) -> None:
    """`check_source` for a model, or for the model of an adapter."""
    base = adapted_model(model_path)
    check_source(base or model_path, f"the model of the adapter in {model_path}" if base else where, loading)


def tokenizer_for(
    model_path: Any, config: TokenizerConfig, loading: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that `config` names; if it names none, the model's own. Warns if the two tokenize differently.

    Args:
        model_path: hub name, folder, ``.nemo`` archive or config of the model.
        loading: ``model.model_extra_configs``; its `LOADING` keys also load the model's own tokenizer.

    Raises:
        ValueError: `config` names none and `model_path` is a ``PretrainedConfig``; or see `load_tokenizer`.
        OSError: the tokenizer could not be loaded; the message says what to write.
    """
    home, named = _home(model_path), config.tokenizer_path
    carried = {name: value for name, value in (loading or {}).items() if name in LOADING}
    if named is None and home is None:
        raise ValueError(
            "model.model_path is a config, which has no tokenizer: write in tokenizer.tokenizer_path a hub name, a "
            "folder or a tokenizer object"
        )
    tokenizer = load_tokenizer(
        home if named is None else named,
        padding_side=config.padding_side,
        truncation_side=config.truncation_side,
        extra=(carried if named is None else {}) | config.tokenizer_extra_configs,
    )
    if named is not None and home is not None:
        _warn_if_foreign(tokenizer, named, home)
    return tokenizer


def _home(model_path: Any) -> str | None:
    """The folder or hub name of the model's own tokenizer; None if the model is no path."""
    if not isinstance(model_path, (str, Path)):
        return None
    folder = Path(model_path)
    if folder.suffix == ".nemo" and folder.is_file():
        return str(folder.parent)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return str(folder)
    return _home(adapted_model(folder)) or str(model_path)


def _warn_if_foreign(tokenizer: PreTrainedTokenizerBase, named: Any, home: str) -> None:
    name = named if isinstance(named, str) else tokenizer.name_or_path
    if not Path(home).is_dir():  # a download just to compare would take too long
        if name and name != home:
            logger.info(f"tokenizer.tokenizer_path names the tokenizer {name}, not that of the model {home}")
        return
    if not any((Path(home) / file).is_file() for file in TOKENIZER_FILES):
        return
    own, given = read_tokenizer(home).get_vocab(), tokenizer.get_vocab()
    others = sum(given.get(token) != index for token, index in own.items())
    if others:
        logger.warning(
            f"The tokenizer that tokenizer.tokenizer_path names ({name or 'an object'}) is not that of the model in "
            f"{home}: {others} of the model's {len(own)} tokens have another id, so the model would read other texts. "
            "Leave tokenizer.tokenizer_path out to take the model's own"
        )
