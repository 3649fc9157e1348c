"""Checks of paths before Hugging Face's libraries load them, and their progress bars while they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

WHICH_FILES = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
"""Keyword arguments of ``from_pretrained`` that say which files are read."""


def check_source(path: Any, where: str, options: Mapping[str, Any] | None = None) -> None:
    """Raises an OSError if `path`, which messages call `where`, is neither a hub name, a folder nor a file of a model.

    `options` are keyword arguments of ``from_pretrained``. A `path` that is no text (a config, a model) is not checked.
    """
    options = options or {}
    if not isinstance(path, str) or Path(path).is_file() or {"config", "gguf_file"} & options.keys():
        return
    check_folder(path, where)
    which = {name: options[name] for name in WHICH_FILES if name in options}
    try:
        with suppress(OSError):  # the cache first: without a network, the hub's time-out would take long
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
    """Raises an OSError if `path` cannot be a hub name and does not exist."""
    is_path = path.startswith(("/", ".")) or path.count("/") > 1 or path.endswith(("/", ".nemo"))
    if is_path and not Path(path).exists():
        raise OSError(f"{where} is {path!r}, which does not exist (seen from {Path.cwd()})")


def first_line(error: Exception) -> str:
    """The type and the first line of a library's error, without its advice."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@contextmanager
def no_bars() -> Iterator[None]:
    """In this block transformers shows no progress bars, which would break the display. Bars of downloads stay."""
    shown, hides_downloads = hf_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    hf_logging.disable_progress_bar()  # this and enable_progress_bar also switch the bars of downloads
    if not hides_downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
        if hides_downloads:
            disable_progress_bars()
