"""Packages that may be missing.

Only the absence of the named package becomes "pip install ...". An error raised inside an installed package, or inside
one of our own modules, is a bug and is raised as it is.
"""

from __future__ import annotations

import importlib.util
import sys


def require(*names: str, extra: str, purpose: str) -> None:
    """Makes sure that modules are installed, without importing them.

    Raises:
        ImportError: "`purpose` needs ...", with all that are missing and how to install them.
    """
    missing = [name for name in names if not is_available(name)]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        needs = f"{purpose} needs {' and '.join(missing)}, which {are} not installed"
        raise ImportError(f'{needs}: pip install "trlx[{extra}]"', name=missing[0])


def is_available(name: str) -> bool:
    """Whether the module `name` is installed. Imports its parents only; their errors are raised."""
    if name in sys.modules:
        return sys.modules[name] is not None
    parent = name.rpartition(".")[0]
    return (not parent or is_available(parent)) and importlib.util.find_spec(name) is not None
