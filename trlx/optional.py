"""Imports of packages that may be missing.

Only the absence of the named package becomes "pip install ...". An error raised inside an installed package, or inside
one of our own modules, is a bug and is raised as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from trlx import logging

logger = logging.get_logger(__name__)


def optional_import(name: str, *, extra: str) -> Any:
    """The module `name`, or a false `Placeholder` where it is not installed; `extra` of trlx installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if is_available(name):  # a module that it imports is missing
            raise
        logger.debug("%s is not installed", name, exc_info=True)
        return Placeholder(name, extra, error)


def require(*names: str, extra: str, purpose: str) -> None:
    """Makes sure that modules are installed, without importing them.

    Raises:
        ImportError: "`purpose` needs ...", with all that are missing and how to install them.
    """
    missing = [name for name in names if not is_available(name)]
    if not missing:
        return
    try:
        importlib.import_module(missing[0])
    except ModuleNotFoundError as error:
        logger.debug("%s is not installed", missing[0], exc_info=True)
        raise ImportError(_advice(purpose, missing, extra), name=missing[0]) from error


def is_available(name: str) -> bool:
    """Whether the module `name` is installed. Imports its parents only; their errors are raised."""
    if name in sys.modules:
        return sys.modules[name] is not None
    parent = name.rpartition(".")[0]
    return (not parent or is_available(parent)) and importlib.util.find_spec(name) is not None


class Placeholder:
    """Stands for a module that is not installed: false, and raises ImportError on first use."""

    def __init__(self, name: str, extra: str, error: ImportError):
        self._message = _advice("This", [name], extra)
        self._error = error

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # Python and inspect look for __path__, __wrapped__ and the like
            raise AttributeError(attribute)
        raise ImportError(self._message, name=self._error.name) from self._error


def _advice(purpose: str, missing: list[str], extra: str) -> str:
    are = "is" if len(missing) == 1 else "are"
    return f'{purpose} needs {" and ".join(missing)}, which {are} not installed: pip install "trlx[{extra}]"'
