"""One trial of a sweep: the process that trains, and the evaluations that it measures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trlx.launch.script import PID
from trlx.strict import suggestion
from trlx.tracking import METRICS, RUN_FILES, set_aside

SETTINGS = "trial.json"
"""File in the trial's folder with its settings."""
LOG = "output.log"
"""File in the trial's folder with what its process printed."""
MEASURES = ("reward/", "metrics/")
"""Beginnings of the names that every evaluation measures."""
HANDED, TAKEN = "handed", "taken.json"
"""In a trial's folder: checkpoints that other trials may go on from; the one that it took, with its settings then."""
BEST = "best_checkpoint"
MOST_HANDED = 4
"""Checkpoints in ``handed``: a trial that waits for a free processor may take one that is not the newest."""


class TrialError(RuntimeError):
    """A trial ended without what the sweep needs; the message says why and where its output is."""


class Trial:
    """A run with one choice of settings, as a process that writes into a folder of its own.

    The process starts when the first evaluation is asked for. After `pause` it starts again and goes on from its
    newest checkpoint.

    Args:
        command: starts the run in the folder `cwd`; see `trlx.launch.trial_process`. ``{}`` in it stands for the file
            with the settings.
        folder: gets what the run writes, ``trial.json`` and ``output.log``.
        settings: dotted names with values.
        metric: the name in metrics.jsonl that every evaluation must have.
        seen: optimizer step of the last evaluation that is known already.
    """

    def __init__(
        self, command: Sequence[str], cwd: Path, folder: Path, settings: Mapping[str, Any], metric: str, seen: int = -1
    ):
        self.command, self.cwd, self.folder, self.metric, self.seen = command, cwd, folder, metric, seen
        own = {"checkpoint_dir": str(folder), "logging_dir": str(folder), "resume_from_checkpoint": "auto"}
        self.settings = {**settings, **{f"train.{name}": value for name, value in own.items()}}
        self._process: subprocess.Popen | None = None
        self._read = 0  # bytes of metrics.jsonl
        self._names: dict[str, None] = {}  # in metrics.jsonl

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
            for entry in self._new_lines():
                if entry["step"] > self.seen and self._is_evaluation(entry):
                    return self._checked(entry)
            if ended:
                self.stop()
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
            self._process.stdin.close()
            self._process = None

    def hand_over(self) -> str | None:
        """The folder of a copy of the newest checkpoint, of which another trial can go on; None if there is none.

        Files of checkpoints are linked. The run must be paused.
        """
        from trlx import checkpoint

        newest, handed = checkpoint.newest(self.folder), self.folder / HANDED
        if newest is None:
            return None
        target = handed / newest.name
        if not target.exists():
            part = handed / "part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            checkpoint.link(newest, part / newest.name)
            if (best := checkpoint.find(self.folder / BEST)) is not None:
                checkpoint.link(best, part / BEST)
            shutil.copyfile(self.folder / METRICS, part / METRICS)
            part.rename(target)
        for old in sorted(handed.iterdir())[:-MOST_HANDED]:
            shutil.rmtree(old)
        return str(target)

    def take(self, handed: str | None) -> None:
        """Puts what another trial handed over in place of this trial's checkpoints and metrics.

        Raises:
            TrialError: there is nothing, or no longer.
        """
        from trlx import checkpoint

        taken, now = self.folder / TAKEN, json.dumps([handed, self.settings])
        if taken.exists() and taken.read_text() == now:  # the sweep was interrupted after that
            return
        if handed is None or not Path(handed).is_dir():
            raise TrialError(f"The trial to go on from has no checkpoint{f' {handed} any more' if handed else ''}")
        for own in (*checkpoint.checkpoints(self.folder), self.folder / BEST):
            shutil.rmtree(own, ignore_errors=True)
        set_aside(self.folder, RUN_FILES)
        for path in Path(handed).iterdir():
            if path.is_dir():
                checkpoint.link(path, self.folder / path.name)
            else:
                shutil.copyfile(path, self.folder / path.name)
        taken.write_text(now)

    def _start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self.folder / SETTINGS
        settings.write_text(json.dumps(self.settings, indent=1), encoding="utf-8")
        (self.folder / PID).unlink(missing_ok=True)
        self._read = 0
        with open(self.folder / LOG, "ab") as log:
            return subprocess.Popen(
                [str(settings) if word == "{}" else word for word in self.command],
                cwd=self.cwd,
                stdin=subprocess.PIPE,  # the run ends if this process dies, see trlx.launch.trial_process
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, which `stop` ends as a whole
            )

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        path = self.folder / METRICS
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
                entry = json.loads(line)
                self._names |= dict.fromkeys(name for name in entry if name != "step")
                yield entry

    def _is_evaluation(self, entry: Mapping[str, Any]) -> bool:
        """Whether a line has the metric, or should have it."""
        should = self.metric.startswith(MEASURES) and any(name.startswith(MEASURES) for name in entry)
        return should or self.metric in entry

    def _checked(self, entry: dict[str, Any]) -> dict[str, float]:
        if self.metric not in entry:
            raise TrialError(self._unmeasured([name for name in entry if name.startswith(MEASURES)]))
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
            raise TrialError(self._unmeasured(list(self._names)))

    def _unmeasured(self, names: list[str]) -> str:
        told = ", ".join(names) or f"nothing: there is no {METRICS} in {self.folder}"
        return f"The run does not measure {self.metric!r}.{suggestion(self.metric, names)} It measures: {told}"


def launch_command(words: Sequence[str], num_gpus: int = 0, accelerate_config: Path | None = None) -> list[str]:
    """What starts a trial in one process, or by ``accelerate launch`` in several, see `Trial`.

    Args:
        words: a script, or what comes after ``trlx`` in a command that trains.
        num_gpus: above 1 it is the number of processes as well.
        accelerate_config: file for accelerate, which may say the number of processes.
    """
    work = ["-m", "trlx.launch.trial_process", "{}", *words]
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
