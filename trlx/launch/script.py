"""Scripts that define ``main(hparams)``. As a module: runs one in this process, with settings from a file of JSON."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import symtable
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PID = "pid"
"""File beside that of the settings: the number of the process, the first where there are several."""


def check_script(script: str) -> None:
    """Makes sure, without running it, that a script can be a trial.

    Args:
        script: a file, or a dotted module that is found from the current folder.

    Raises:
        FileNotFoundError: there is no such file or module.
        ValueError: it is no Python, or does not define ``main``.
    """
    path = script_path(script)
    if path.suffix != ".py" or not path.is_file():
        raise FileNotFoundError(
            f"there is no script {script}; name a Python file, or a module below the current folder"
        )
    try:
        names = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec")
    except SyntaxError as error:
        raise ValueError(f"{script} is not valid Python: {error}") from None
    if "main" not in names.get_identifiers() or not _is_bound(names.lookup("main")):
        raise ValueError(f"{script} defines no main(hparams): a sweep calls it with the settings of a trial")


def script_path(script: str) -> Path:
    """The file of a script that is named as a path or, like ``examples.ppo_sentiments``, as a module."""
    return Path(script) if _is_path(script) else Path(*script.split(".")).with_suffix(".py")


def run_script(script: str, hparams: dict[str, Any]) -> None:
    """Calls the ``main`` of a script; the script finds its neighbours and what lies in the current folder."""
    path = script_path(script).resolve()
    # last, since a neighbour may be called like an installed package
    sys.path[:] = [str(Path.cwd()), *sys.path, str(path.parent)]
    sys.argv = [str(path)]  # runs are named after the script
    module = importlib.import_module(script) if not _is_path(script) else _load(path)
    module.main(hparams)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_trial", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _is_path(script: str) -> bool:
    return script.endswith(".py") or "/" in script


def _is_bound(name: symtable.Symbol) -> bool:
    return name.is_assigned() or name.is_imported()


def _run_as_told(script: str, hparams: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        hparams.with_name(PID).write_text(str(os.getpid()), encoding="utf-8")
    # whoever started this may have blocked Ctrl-C, by which a trial is ended
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_script(script, json.loads(hparams.read_text(encoding="utf-8")))


if __name__ == "__main__":
    _run_as_told(sys.argv[1], Path(sys.argv[2]))
