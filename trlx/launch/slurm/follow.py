"""Prints the log of a job while it grows, until the job ends."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ENDS = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
"""States of a job that does not start again."""
INTERRUPTED = 130


def follow(number: str, log: Path | None = None, poll_seconds: float = 5) -> int:
    """Prints what a job writes, in each of its starts, and on stderr when its state changes.

    Args:
        number: of the job; of a trial of an array it is JOB_TRIAL.
        log: None: the one that SLURM names.
        poll_seconds: between two questions to SLURM; the log is read every second.

    Returns:
        0 if the job has completed, else its exit code, or 1 if it has none; 130 after Ctrl-C, and the job goes on.

    Raises:
        ValueError: SLURM knows no such job.
        ChildProcessError: SLURM does not answer.
    """
    shown, told, asked = 0, None, None
    try:
        while True:
            if asked is None or time.monotonic() - asked >= poll_seconds:
                job, asked = state_of(number), time.monotonic()
                log = log or Path(job["StdOut"])
            shown = _print_from(log, shown)
            if (state := _in_words(job)) != told:
                print(f"Job {number}: {state}", file=sys.stderr, flush=True)
                told = state
            if job["JobState"] in ENDS:
                return 0 if job["JobState"] == "COMPLETED" else int(job["ExitCode"].split(":")[0]) or 1
            time.sleep(min(1, poll_seconds))
    except KeyboardInterrupt:
        print(f"\nJob {number} goes on. To see more of it: trlx submit --follow-job {number}", file=sys.stderr)
        return INTERRUPTED


def state_of(number: str) -> dict[str, str]:
    """What SLURM says about a job: JobState, Restarts, ExitCode, StdOut and more.

    Raises:
        FileNotFoundError, ValueError, ChildProcessError: see `follow`.
    """
    if shutil.which("scontrol") is None:
        raise FileNotFoundError("There is no scontrol here: use a machine of the cluster")
    for tried in range(10):
        ran = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True)
        if ran.returncode == 0:
            return dict(re.findall(r"(StdOut|\w+)=((?<=StdOut=).*|\S*)", ran.stdout))
        if "Invalid job id" in ran.stderr:
            raise ValueError(f"SLURM knows no job {number}; it forgets a job some minutes after its end")
        time.sleep(tried)  # the controller is restarted, or has too much to do
    raise ChildProcessError(f"SLURM does not answer: {' '.join(ran.stderr.split())}. The job may go on")


def _in_words(job: dict[str, str]) -> str:
    state = {"PENDING": f"waits ({job['Reason']})".replace(" (None)", ""), "RUNNING": f"runs on {job['NodeList']}"}
    starts = f", start {int(job['Restarts']) + 1}" if job["Restarts"] != "0" else ""
    return state.get(job["JobState"], job["JobState"].lower()) + starts


def _print_from(log: Path, position: int) -> int:
    """Prints a file from a position on; returns the position of its end."""
    if not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        print(file.read().decode(errors="replace"), end="", flush=True)
        return file.tell()
