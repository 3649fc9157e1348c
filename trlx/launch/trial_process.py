"""The process of a trial of a sweep.

``python -m trlx.launch.trial_process FILE SCRIPT`` calls the ``main`` of a script with the settings in a JSON file;
``python -m trlx.launch.trial_process FILE trlx WORD...`` is ``trlx WORD...`` with these settings.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from trlx.launch.cli import main
from trlx.launch.script import PID, TRLX, assignments, run_script


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
