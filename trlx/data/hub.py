"""What is asked of Hugging Face's libraries before and while something is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

WHICH_FILES = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
"""Keyword arguments of ``from_pretrained`` that say which files are read."""


def check_source(path: Any, where: str, options: Mapping[str, Any] | None = None) -> None:
    """Makes sure, before anything is loaded, that there is a model at `path`.

    Args:
        path: hub name, folder or file; anything else (a config, a model) stands for itself.
        where: what messages call the setting.
        options: keyword arguments of ``from_pretrained``.

    Raises:
        OSError: there is none.
    """
    options = options or {}
    if not isinstance(path, str) or Path(path).is_file() or {"config", "gguf_file"} & options.keys():
        return
    check_folder(path, where)
    which = {name: options[name] for name in WHICH_FILES if name in options}
    try:
        with suppress(OSError):  # what is in the cache is not waited for where there is no network
            if cached_file(path, "config.json", **{**which, "local_files_only": True}):
                return
        found = cached_file(path, "config.json", **which)
    except Exception as error:  # of many kinds
        raise OSError(
            f"No model at {path!r}, which is {where}: there is no such folder, nor a model of that name on the Hugging "
            f"Face hub that can be reached from here or is in the local cache ({first_line(error)})"
        ) from None
    if found is None and Path(path).is_dir():
        raise OSError(f"No model at {path!r}, which is {where}: the folder has no config.json")


def check_folder(path: str, where: str) -> None:
    """Makes sure that a path which cannot be a hub name exists.

    Raises:
        OSError: it does not.
    """
    is_path = path.startswith(("/", ".")) or path.count("/") > 1 or path.endswith(("/", ".nemo"))
    if is_path and not Path(path).exists():
        raise OSError(f"{where} is {path!r}, which does not exist (seen from {Path.cwd()})")


def first_line(error: Exception) -> str:
    """What an error of a library says, without its advice."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@contextmanager
def no_bars() -> Iterator[None]:
    """In this block transformers shows no bars of its own, which would tear that of training to pieces; those of
    downloads stay."""
    shown, downloads = hf_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    hf_logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
