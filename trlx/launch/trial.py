"""One trial of a sweep: a process that runs the script, its evaluations as they come, pausing and stopping it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trlx.launch.script import PID
from trlx.strict import suggestion
from trlx.tracking import METRICS

RECORD = "trial.json"
"""Settings and state of a trial, in its folder."""
LOG = "output.log"
"""What its process printed."""


class TrialError(RuntimeError):
    """A trial ended without what the sweep asked of it; the message says why and where its output lies."""


@dataclass(frozen=True)
class Launch:
    """How every trial of a sweep is started.

    `script` defines ``main(hparams)`` and runs in the folder `cwd`; `common` are dotted settings that say nothing about
    how well it learns, and that those of a trial go over; `num_gpus` above 1 means as many processes, and
    with `accelerate_config`, a file, processes are made as it says.
    """

    script: str
    cwd: Path
    metric: str
    common: Mapping[str, Any] = field(default_factory=dict)
    num_gpus: int = 0
    accelerate_config: Path | None = None

    def command(self, hparams: Path) -> list[str]:
        """The command line that runs the script with the settings in the file `hparams`."""
        work = ["-m", "trlx.launch.script", self.script, str(hparams)]
        if self.accelerate_config is None and self.num_gpus <= 1:
            return [sys.executable, *work]
        # port 0: any free one, since trials run side by side
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        how = ["--config_file", str(self.accelerate_config)] if self.accelerate_config else ["--multi_gpu"]
        count = ["--num_processes", str(self.num_gpus)] if self.num_gpus else []
        return [*accelerate, *how, *count, *work]


class Trial:
    """The script with one choice of settings, in a folder of its own.

    Its process starts when the first evaluation is asked for, and again after `pause`: it then goes on from the
    checkpoint that it was asked to write.

    Args:
        launch: what all trials have in common.
        folder: exists; gets what the run writes, ``trial.json`` and ``output.log``.
        hparams: dotted settings.
        seen: optimizer step of the last evaluation that was handed out before, by another object for this folder.
    """

    def __init__(self, launch: Launch, folder: Path, hparams: Mapping[str, Any], seen: int = -1):
        self.launch, self.folder, self.hparams, self.seen = launch, folder, dict(hparams), seen
        self._process: subprocess.Popen | None = None
        self._offset = 0  # bytes of metrics.jsonl read
        self._record("waiting")

    def next_evaluation(self, poll_seconds: float = 0.5) -> dict[str, float] | None:
        """Waits for a line of metrics.jsonl that holds the metric; None once the run has ended.

        Returns:
            The numbers of that line, with ``step``.

        Raises:
            TrialError: the run failed, or does not measure the metric, or measured no finite number.
        """
        try:
            process = self._process or self._start()
            while True:
                ended = process.poll() is not None  # asked first: what it wrote last must not be missed
                found = self._unseen()
                if found is not None:
                    return found
                if ended:
                    return self._finish(process.returncode)
                time.sleep(poll_seconds)
        except TrialError as error:
            self.stop("failed", str(error))
            raise

    def pause(self, patience: float = 600) -> None:
        """Lets the run write a checkpoint and end; the next evaluation starts it again from there."""
        if self._process is None:
            return
        pid = self.folder / PID
        if self._process.poll() is None and pid.exists():
            # the first process of the run rather than what launched it, which would end its children at once
            _send(int(pid.read_text()), signal.SIGTERM)
            _wait(self._process, patience)
        self.stop("paused")

    def stop(self, state: str = "stopped", reason: str | None = None) -> None:
        """Ends the run, if there is one, as Ctrl-C would; writes down `state` and why."""
        if self._process is not None:
            if self._process.poll() is None:
                _send(self._process.pid, signal.SIGINT, group=True)
                _wait(self._process, 20)
            _send(self._process.pid, signal.SIGKILL, group=True)
            self._process.wait()
            self._process = None
            self._record(state, reason)

    def _start(self) -> subprocess.Popen:
        hparams = self.folder / "hparams.json"
        hparams.write_text(json.dumps(self._settings(), indent=1), encoding="utf-8")
        (self.folder / PID).unlink(missing_ok=True)
        self._offset = 0
        with open(self.folder / LOG, "ab") as log:
            self._process = subprocess.Popen(
                self.launch.command(hparams),
                cwd=self.launch.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, which can be ended as a whole
            )
        self._record("running")
        return self._process

    def _settings(self) -> dict[str, Any]:
        folder = str(self.folder)
        # "auto": from the checkpoint of a pause, where there is one
        own = {"checkpoint_dir": folder, "logging_dir": folder, "resume_from_checkpoint": "auto"}
        return {**self.launch.common, **self.hparams} | {f"train.{name}": value for name, value in own.items()}

    def _unseen(self) -> dict[str, float] | None:
        """The first evaluation that has not been handed out."""
        path = self.folder / METRICS
        if not path.exists():
            return None
        if path.stat().st_size < self._offset:  # a run without a checkpoint began anew
            self._offset = 0
        with open(path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # the run is in the middle of it
                    break
                self._offset += len(line)
                entry = json.loads(line)
                if entry["step"] > self.seen and _is_evaluation(entry, self.launch.metric):
                    return self._checked(entry)
        return None

    def _checked(self, entry: dict[str, Any]) -> dict[str, float]:
        metric = self.launch.metric
        if metric not in entry:
            names = [name for name in entry if _is_measure(name)]
            near = suggestion(metric, names)
            raise TrialError(f"The run does not measure {metric!r}.{near} It measures: {', '.join(names)}")
        if entry[metric] is None:
            raise TrialError(f"{metric} was not a finite number at step {entry['step']}")
        self.seen = entry["step"]
        return {name: value for name, value in entry.items() if isinstance(value, (int, float))}

    def _finish(self, code: int) -> None:
        if code != 0:
            log = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            end = "\n".join(log[-12:])
            raise TrialError(f"The run ended with code {code}. The end of {self.folder / LOG}:\n{end}")
        if self.seen < 0:
            raise TrialError(f"The run ended without a single {self.launch.metric!r} in {self.folder / METRICS}")
        self.stop("finished")

    def _record(self, state: str, reason: str | None = None) -> None:
        record = {"hparams": self.hparams, "state": state, "reason": reason}
        (self.folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def claim_folder(parent: Path) -> tuple[int, Path]:
    """Makes the first ``trial_<number>`` that is not there yet, also where several processes ask at once."""
    number = 0
    while True:
        folder = parent / f"trial_{number:03d}"
        try:
            folder.mkdir(parents=True)
            return number, folder
        except FileExistsError:
            number += 1


def _is_evaluation(entry: Mapping[str, Any], metric: str) -> bool:
    """Has the metric, or is a line that should have it."""
    return metric in entry or (_is_measure(metric) and any(map(_is_measure, entry)))


def _is_measure(name: str) -> bool:
    return name.startswith(("reward/", "metrics/"))


def _send(pid: int, number: signal.Signals, group: bool = False) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        (os.killpg if group else os.kill)(pid, number)


def _wait(process: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
