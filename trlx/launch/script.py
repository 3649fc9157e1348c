"""What a trial of a sweep runs: a script that defines ``main(hparams)``, or ``trlx train`` or a short form of it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import symtable
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

PID = "pid"
"""File next to the settings with the id of the process, or of the first one if there are several."""


TRLX = "trlx"
"""First word of a command that trains, where a script's name would stand."""


def assignments(hparams: Mapping[str, Any]) -> list[str]:
    """Settings as the command line takes them."""
    return [f"{name}={json.dumps(value)}" for name, value in hparams.items()]


def check_script(script: str) -> None:
    """Makes sure that a script can be a trial. The script does not run.

    Args:
        script: a file, or a dotted module below the current folder.

    Raises:
        FileNotFoundError: there is no such file or module.
        ValueError: it is not valid Python, or does not define ``main``.
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
    main = names.lookup("main") if "main" in names.get_identifiers() else None
    if main is None or not (main.is_assigned() or main.is_imported()):
        raise ValueError(f"{script} defines no main(hparams): a sweep calls it with the settings of a trial")


def script_path(script: str) -> Path:
    """The file of a script, which is named by a path or by a module such as ``examples.ppo_sentiments``."""
    return Path(script) if _is_path(script) else Path(*script.split(".")).with_suffix(".py")


def run_script(script: str, hparams: dict[str, Any]) -> None:
    """Calls the ``main`` of a script. The script can import modules from its own folder and from the current one."""
    path = script_path(script).resolve()
    # the script's folder is last, since a file in it may have the name of an installed package
    sys.path[:] = [str(Path.cwd()), *sys.path, str(path.parent)]
    sys.argv = [str(path)]  # run names contain the script's name
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
