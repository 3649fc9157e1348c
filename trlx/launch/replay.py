"""``trlx replay``: runs a command again up to one step, and says which number and which tensor differ first.

The command trains as it did, but from the run's last checkpoint before that step, and into a folder of its own.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trlx import checkpoint
from trlx.config import TRLConfig
from trlx.run.steps import Digest
from trlx.tracking import CONFIG, DIGESTS, ENVIRONMENT, logged, read_lines
from trlx.trainer.base import Trainer

ASKED = "TRLX_REPLAY"
"""The variable of the environment with the `Replay` that `trlx.train` shall do, as JSON."""
FOUND = "replay.json"
NOT_COMPARED = ("time/", "memory/")
"""Beginnings of the names of numbers that differ from run to run."""

Entries = dict[int, dict[str, Any]]
"""What each step left, by name."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What is computed again, and where."""

    run: str
    """The folder of the run: its ``train.logging_dir``, or its ``train.checkpoint_dir``."""
    step: int
    folder: str
    """An empty folder."""
    tolerance: float = 0.0
    """Relative; 0: bit by bit."""

    @classmethod
    def asked(cls) -> Replay | None:
        """The replay that this process was started for, if it was."""
        told = os.environ.get(ASKED)
        return cls(**json.loads(told)) if told else None

    def config(self, config: TRLConfig) -> TRLConfig:
        """The settings of a run from the last checkpoint before the step.

        Raises:
            ValueError: `config` is that of another run.
        """
        recorded = _settings(self.run)["train"]
        if config.train.checkpoint_dir != recorded["checkpoint_dir"]:
            raise ValueError(
                f"The command trains into {config.train.checkpoint_dir}, and the run in {self.run} trained into "
                f"{recorded['checkpoint_dir']}: write the run's own command after --"
            )
        start = self.start
        changes = {
            "checkpoint_dir": self.folder,
            "logging_dir": None,
            "rollout_logging_dir": None,
            "tracker": None,
            "push_to_hub": None,
            "resume_from_checkpoint": start and str(start),
            "record_steps": sorted(self._digests(self.run)) or None,
        }
        return config.evolve(train=changes)

    def learn(self, trainer: Trainer) -> None:
        """Trains up to the step, without evaluations and checkpoints, and writes down what differs.

        Raises:
            SystemExit: always, since the rest of the command belongs to the run.
        """
        trainer.config.train.total_steps = self.step
        trainer.evaluator = None
        trainer.begin_to_save = lambda *_, **__: None
        trainer.learn()
        trainer.backend.on_main(lambda: (Path(self.folder) / FOUND).write_text(json.dumps(list(self.differences()))))
        raise SystemExit(0)

    @property
    def start(self) -> Path | None:
        """The newest checkpoint before the step; None: the run's beginning."""
        own = checkpoint.checkpoints(self.run)
        found = own or checkpoint.checkpoints(_settings(self.run)["train"]["checkpoint_dir"])
        return next((path for path in reversed(found) if checkpoint.step_of(path) < self.step), None)

    @property
    def first(self) -> int:
        """The first step that is computed again."""
        return checkpoint.step_of(self.start) + 1 if self.start else 1

    def differences(self) -> Iterator[tuple[bool, str]]:
        """(whether some differ, a sentence) for the numbers, and for the tensors, of the steps."""
        then, now = self._numbers(self.run), self._numbers(self.folder)
        yield _compared("numbers", then, now, self._same_number, "{}".format)
        then, now = self._digests(self.run), self._digests(self.folder)
        yield _compared("tensors", then, now, self._same_tensor, _told)

    def _numbers(self, folder: str) -> Entries:
        return {step: line for step, line in _numbers(folder).items() if self.first <= step <= self.step}

    def _digests(self, folder: str) -> Entries:
        lines = {line["step"]: line["tensors"] for line in read_lines(Path(folder) / DIGESTS)}
        return {step: tensors for step, tensors in lines.items() if self.first <= step <= self.step}

    def _same_number(self, then: Any, now: Any) -> bool:
        if not (isinstance(then, float) and isinstance(now, float)):
            return then == now
        return math.isclose(then, now, rel_tol=self.tolerance, abs_tol=self.tolerance)

    def _same_tensor(self, then: Digest | None, now: Digest | None) -> bool:
        if then is None or now is None or not self.tolerance:
            return then == now
        # a sum may be next to 0, so its error is measured by the norm
        limit = self.tolerance * then[2]
        return abs(then[1] - now[1]) <= limit and abs(then[2] - now[2]) <= limit


def replay(run: Path, step: int, command: list[str], tolerance: float = 0.0) -> int:
    """Starts `command`, by default that of the run, once more up to a step, and prints what differs.

    Returns:
        1 if something differs, else 0.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: the run has no such step, or its command is not known.
        ChildProcessError: the command failed.
    """
    with tempfile.TemporaryDirectory(prefix="trlx-replay-") as folder:
        asked = Replay(str(run.resolve()), step, folder, tolerance)
        _settings(asked.run)
        taken = _numbers(asked.run)
        if step not in taken:
            raise ValueError(f"The run in {run} has no step {step}: its last one is {max(taken, default=0)}")
        words = command or recorded_command(run)
        start = asked.start or "the beginning"
        print(f"Steps {asked.first} to {step} again, from {start}: {shlex.join(words)}", flush=True)
        done = subprocess.run(words, env={**os.environ, ASKED: json.dumps(asdict(asked))})
        if not (Path(folder) / FOUND).exists():
            raise ChildProcessError(f"The command ended with code {done.returncode} and did not train: see its output")
        found = json.loads((Path(folder) / FOUND).read_text())
    print(*(told for _, told in found), sep="\n")
    return int(any(differs for differs, _ in found))


def recorded_command(run: Path) -> list[str]:
    """The command that a run was last started with.

    Raises:
        ValueError: it is not known, or a launcher started its processes.
    """
    started = list(read_lines(run / ENVIRONMENT))
    program, *rest = (shlex.split(started[-1]["command"]) if started else [])[1:] or [""]
    processes = int(started[-1].get("processes", 1)) if started else 1
    if Path(program).name in ("trlx", "__main__.py") and Path(program).parent.name in ("trlx", "bin"):
        return [sys.executable, "-m", "trlx", *rest, *(["--processes", str(processes)] if processes > 1 else [])]
    if processes > 1 or not Path(program).is_file():
        raise ValueError(f"How to start the run in {run} is not known: write its command after --, as you typed it")
    return [sys.executable, program, *rest]


def _settings(run: str) -> dict[str, Any]:
    path = Path(run) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"There is no {CONFIG} in {run}: name the run's train.logging_dir or checkpoint_dir")
    return json.loads(path.read_text(encoding="utf-8"))


def _numbers(folder: str) -> Entries:
    """What each optimizer step logged, by step, without what differs from run to run."""
    taken = [line for line in logged(folder) if "skipped_steps" in line]
    return {line["step"]: {name: x for name, x in line.items() if not name.startswith(NOT_COMPARED)} for line in taken}


def _compared(kind: str, then: Entries, now: Entries, same: Callable, told: Callable) -> tuple[bool, str]:
    """Whether entries differ, and a sentence that names the first one."""
    if not then:
        return False, f"{kind}: none were recorded (train.record_steps)"
    for step, entries in then.items():
        others = now.get(step, {})
        odd = [name for name in {**entries, **others} if not same(entries.get(name), others.get(name))]
        if odd:
            values = f"{told(entries.get(odd[0]))} then, {told(others.get(odd[0]))} now"
            more = f"; so do {len(odd) - 1} others of this step" if len(odd) > 1 else ""
            return True, f"{kind}: {odd[0]} of step {step} differs: {values}{more}"
    return False, f"{kind}: all {sum(map(len, then.values()))} agree, of steps {', '.join(map(str, then))}"


def _told(digest: Digest | None) -> str:
    return "none" if digest is None else f"sum {digest[1]:.9g}, norm {digest[2]:.9g} ({digest[0]})"
