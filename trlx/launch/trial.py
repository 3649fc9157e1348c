"""One trial of a sweep: the process that runs the script, and the evaluations that it measures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trlx.launch.script import PID
from trlx.strict import suggestion
from trlx.tracking import METRICS

SETTINGS = "trial.json"
"""File in the trial's folder with the settings that ``main(hparams)`` gets."""
LOG = "output.log"
"""File in the trial's folder with what its process printed."""
MEASURES = ("reward/", "metrics/")
"""Beginnings of the names that every evaluation measures."""


class TrialError(RuntimeError):
    """A trial ended without what the sweep needs; the message says why and where its output is."""


class Trial:
    """The script with one choice of settings, as a process that writes into a folder of its own.

    The process starts when the first evaluation is asked for. After `pause` it starts again and goes on from its
    newest checkpoint.

    Args:
        command: starts the script in the folder `cwd`; the path of the file with the settings is added.
        folder: gets what the run writes, ``trial.json`` and ``output.log``.
        settings: dotted names with values.
        metric: the name in metrics.jsonl that every evaluation must have.
        seen: optimizer step of the last evaluation that is known already.
    """

    def __init__(
        self, command: list[str], cwd: Path, folder: Path, settings: Mapping[str, Any], metric: str, seen: int = -1
    ):
        self.command, self.cwd, self.folder, self.metric, self.seen = command, cwd, folder, metric, seen
        own = {"checkpoint_dir": str(folder), "logging_dir": str(folder), "resume_from_checkpoint": "auto"}
        self.settings = {**settings, **{f"train.{name}": value for name, value in own.items()}}
        self._process: subprocess.Popen | None = None
        self._read = 0  # bytes of metrics.jsonl

    def next_evaluation(self, poll_seconds: float = 0.5) -> dict[str, float] | None:
        """Waits for a line of metrics.jsonl with the metric; None once the run has ended.

        Returns:
            The numbers of that line, with ``step``.

        Raises:
            TrialError: the run failed, or does not measure the metric, or measured no finite number.
        """
        process = self._process = self._process or self._start()
        while True:
            ended = process.poll() is not None  # asked before reading, so that the last lines are read
            for entry in self._evaluations():
                if entry["step"] > self.seen:
                    return self._checked(entry)
            if ended:
                self._check_end(process.returncode)
                return None
            time.sleep(poll_seconds)

    def pause(self, patience: float = 600) -> None:
        """Lets the run write a checkpoint and end, which may take `patience` seconds."""
        pid = self.folder / PID
        if self._process is not None and self._process.poll() is None and pid.exists():
            # to the first process of the run: accelerate's launcher would kill its children at once
            _signal(int(pid.read_text()), signal.SIGTERM)
            _wait(self._process, patience)
        self.stop()

    def stop(self) -> None:
        """Ends the run, if there is one: as Ctrl-C would, and after 20 seconds by force."""
        if self._process is not None:
            if self._process.poll() is None:
                _signal(self._process.pid, signal.SIGINT, group=True)
                _wait(self._process, 20)
            _signal(self._process.pid, signal.SIGKILL, group=True)
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self.folder / SETTINGS
        settings.write_text(json.dumps(self.settings, indent=1), encoding="utf-8")
        (self.folder / PID).unlink(missing_ok=True)
        self._read = 0
        with open(self.folder / LOG, "ab") as log:
            return subprocess.Popen(
                [*self.command, str(settings)],
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, which `stop` ends as a whole
            )

    def _evaluations(self) -> Iterator[dict[str, Any]]:
        """New lines of metrics.jsonl that have the metric, and those of evaluations, which should have it."""
        path = self.folder / METRICS
        marks = [f'"{self.metric}":', *(f'"{name}' for name in MEASURES if self.metric.startswith(MEASURES))]
        if not path.exists():
            return
        if path.stat().st_size < self._read:  # a resumed run cuts the file back to its checkpoint
            self._read = 0
        with open(path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # the run is in the middle of this line
                    return
                self._read += len(line)
                if any(mark.encode() in line for mark in marks):
                    yield json.loads(line)

    def _checked(self, entry: dict[str, Any]) -> dict[str, float]:
        if self.metric not in entry:
            names = [name for name in entry if name.startswith(MEASURES)]
            near = suggestion(self.metric, names)
            raise TrialError(f"The run does not measure {self.metric!r}.{near} It measures: {', '.join(names)}")
        if entry[self.metric] is None:
            raise TrialError(f"{self.metric} was not a finite number at step {entry['step']}")
        self.seen = entry["step"]
        return {name: value for name, value in entry.items() if isinstance(value, (int, float))}

    def _check_end(self, code: int) -> None:
        log = self.folder / LOG
        if code != 0:
            end = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:])
            raise TrialError(f"The run ended with code {code}. The end of {log}:\n{end}")
        if self.seen < 0:
            raise TrialError(f"The run ended without a single {self.metric!r} in {self.folder / METRICS}")


def launch_command(script: str, num_gpus: int = 0, accelerate_config: Path | None = None) -> list[str]:
    """What runs a script in one process, or by ``accelerate launch`` in several; the file of settings is missing.

    Args:
        num_gpus: above 1 it is the number of processes as well.
        accelerate_config: file for accelerate, which may say the number of processes.
    """
    work = ["-m", "trlx.launch.script", script]
    if accelerate_config is None and num_gpus <= 1:
        return [sys.executable, *work]
    # port 0 is any free one, since trials run side by side
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    how = ["--config_file", str(accelerate_config)] if accelerate_config else ["--multi_gpu"]
    count = ["--num_processes", str(num_gpus)] if num_gpus else []
    return [*accelerate, *how, *count, *work]


def _signal(pid: int, number: signal.Signals, group: bool = False) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        (os.killpg if group else os.kill)(pid, number)


def _wait(process: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
