"""What a trial of a sweep runs: a script that defines ``main(hparams)``, or ``trlx train`` or one of its short forms.

``python -m trlx.launch.script FILE SCRIPT`` calls the ``main`` of a script with the settings in a JSON file;
``python -m trlx.launch.script FILE trlx WORD...`` is ``trlx WORD...`` with these settings.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import symtable
import sys
import threading
from collections.abc import Mapping, Sequence
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


def _run_as_told(file: Path, words: Sequence[str]) -> int:
    if os.environ.get("RANK", "0") == "0":
        file.with_name(PID).write_text(str(os.getpid()), encoding="utf-8")
        _end_with_the_sweep()
    # a sweep ends a trial by SIGINT, which Ray blocks in its processes and their children
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hparams = json.loads(file.read_text(encoding="utf-8"))
    if words[0] != TRLX:
        run_script(words[0], hparams)
        return 0
    from trlx.launch.cli import main

    sys.argv = list(words)  # run names contain the name of the program
    return main([*words[1:], *assignments(hparams)])


def _end_with_the_sweep() -> None:
    """Asks this run to save and end once its sweep was killed: the other end of standard input closes then."""
    pipe = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a script that asks something gets no answer

    def wait() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(_run_as_told(Path(sys.argv[1]), sys.argv[2:]))
