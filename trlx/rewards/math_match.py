"""A reward for formulas that are equal, whatever they look like."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from trlx.optional import require
from trlx.rewards.functions import SampleReward
from trlx.tracebacks import short_errors


class MathMatch(SampleReward):
    r"""1 where the output's final formula equals the prompt's `column`, else 0, as the package math-verify says.

    "1/2", ``\frac{1}{2}`` and "0.5" are equal. The column holds numbers or formulas, with or without ``$`` around them.
    A comparison that takes more than `timeout` seconds scores 0. Raises an ImportError if math-verify is not installed,
    and a ValueError if an answer is no formula.
    """

    @short_errors
    def __init__(self, column: str = "answer", timeout: float = 10.0):
        require("math_verify", extra="math", purpose="MathMatch")
        super().__init__("outputs", column)
        self.timeout = timeout
        self._process: subprocess.Popen | None = None

    def score(self, output: str, answer: Any) -> bool:
        text = self.text(answer)
        # a model can write formulas that take years; only the end of a process stops these
        if self._process is None or self._process.poll() is not None:
            self._process = _started()
            weakref.finalize(self, _end, self._process)
        self._process.stdin.write(json.dumps([text, output]) + "\n")
        self._process.stdin.flush()
        timer = threading.Timer(self.timeout, self._process.kill)
        timer.start()
        said = self._process.stdout.readline().strip()
        timer.cancel()
        if said == "unknown":
            raise ValueError(f"the prompts' {self.asks[1]!r} must be a number or a formula, got {answer!r}")
        if not said:
            _end(self._process)
        return said == "True"


def _started() -> subprocess.Popen:
    worker = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
    process = subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if not process.stdout.readline():
        _end(process)
        raise RuntimeError("MathMatch could not import math_verify in a process of its own; its error stands above")
    return process


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
