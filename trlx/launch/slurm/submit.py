"""Writes the batch script of a training run, and submits it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trlx import checkpoint
from trlx.config import TRLConfig
from trlx.launch.job import Job, description
from trlx.launch.slurm.follow import follow as follow_job
from trlx.launch.slurm.request import Request
from trlx.launch.space import read_space, trials
from trlx.launch.vllm import command

SCRIPT = "submit.sbatch"
"""The batch script, in the run's folder. It contains `LIBRARY`, so it needs no other file."""
LIBRARY = Path(__file__).with_name("run.sh")
SETTINGS = "trial.settings"
"""In the folder of a trial: its settings, one ``key=value`` a line."""


def submit(job: Job, request: Request, sweep: Path | None = None, dry_run: bool = False, follow: bool = True) -> int:
    """Checks a run, writes its batch script into its folder, submits it and follows it; returns an exit status.

    Args:
        sweep: file of a sweep: an array of jobs, each with the settings of one trial, which is not followed.
        dry_run: prints the script, and neither writes nor submits it.
        follow: prints the log until the job ends.

    Raises:
        ValueError, TypeError, OSError, ImportError: see `Job.arguments`; or SLURM refuses the job.
    """
    request.check()
    if not dry_run and shutil.which("sbatch") is None:
        raise FileNotFoundError("There is no sbatch here: use a machine of the cluster, or add --dry-run")
    words, arguments = job.words(), job.arguments()
    train = arguments["config"].train
    folder = Path(train.checkpoint_dir).absolute()
    drawn = []
    if sweep is not None:
        drawn, array = _array(sweep)
        replace(job, settings=[*job.settings, *drawn[0]]).arguments()
        request = replace(request, sbatch=[*request.sbatch, array])
    written = {folder / f"trial_{number:03d}": settings for number, settings in enumerate(drawn)}
    _check_resume([folder, *written], train.resume_from_checkpoint)
    text = script(words, folder, request, bool(drawn), _servers(arguments["config"], request))
    if dry_run:
        print(*description(job, arguments, request.nodes * request.processes), "", text, sep="\n")
        return 0
    for trial, settings in written.items():
        trial.mkdir(parents=True, exist_ok=True)
        (trial / SETTINGS).write_text("".join(f"{line}\n" for line in settings), encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SCRIPT
    file.write_text(text, encoding="utf-8")
    ran = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if ran.returncode != 0:
        raise ValueError(f"SLURM refuses {file}: {' '.join(ran.stderr.split())}")
    number = ran.stdout.strip().split(";")[0]
    print(f"Job {number}: {file}")
    if drawn:
        print(f"Its {len(drawn)} trials: squeue -j {number}; their logs: {folder}/trial_*/slurm-{number}.log")
        return 0
    log = folder / f"slurm-{number}.log"
    if follow:
        return follow_job(number, log)
    print(f"To see its log: trlx submit --follow-job {number}, or tail -f {log}")
    return 0


def _check_resume(folders: Sequence[Path], source: str | None) -> None:
    if source not in (None, "auto"):
        raise ValueError(
            f"train.resume_from_checkpoint is {source}, but a job goes on from the newest checkpoint of its own "
            "folder: leave the setting out"
        )
    newest = next(filter(None, map(checkpoint.newest, folders)), None)
    if source is None and newest is not None:
        raise ValueError(f"There is a checkpoint {newest}: add --resume to go on from it, or name another --out")


def _array(sweep: Path) -> tuple[list[list[str]], str]:
    """The settings of each trial, as ``key=value``, and the option of sbatch that starts the trials."""
    settings, tune = trials(sweep), read_space(sweep).tune
    if tune.time_budget_s is not None:
        raise ValueError(f"{sweep} has time_budget_s, which trials that are jobs do not share: write --time instead")
    at_once = f"%{tune.max_concurrent_trials}" if tune.max_concurrent_trials else ""
    lines = [[f"{key}={json.dumps(value)}" for key, value in trial.items()] for trial in settings]
    return lines, f"array=0-{len(lines) - 1}{at_once}"


def _servers(config: TRLConfig, request: Request) -> list[str]:
    """Lines of bash that name the vLLM servers of a run."""
    if not request.vllm_nodes:
        return []
    sampler = config.train.sampler
    sampler = {**(sampler if isinstance(sampler, Mapping) else {"engine": sampler}), "url": "http://0.0.0.0:8000"}
    asked = command(config.evolve(train={"sampler": sampler}), request.vllm_python, request.processes)
    variables = [f"{name}={value}" for name, value in asked.variables.items()]
    return [f"SERVERS={request.vllm_nodes}", f"SERVE=({shlex.join(['env', *variables, *asked.words])})"]


def script(
    words: Sequence[str], folder: Path, request: Request, is_array: bool = False, servers: Sequence[str] = ()
) -> str:
    """The batch script of ``trlx WORDS``, whose files go to `folder`, or those of trials to folders in it. `servers`
    are lines of bash that name the servers beside it."""
    log = "trial_%3a/slurm-%A.log" if is_array else "slurm-%j.log"
    options = [f"--job-name={folder.name}", f"--chdir={Path.cwd()}", f"--output={folder / log}", *request.options()]
    setup, last = [f"folder={shlex.quote(str(folder))}"], '"train.checkpoint_dir=$folder"'
    if is_array:
        setup.append('folder+=$(printf /trial_%03d "$SLURM_ARRAY_TASK_ID")')
        setup.append(f'mapfile -t settings <"$folder/{SETTINGS}"')
        last += ' "${settings[@]}"'
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# Written by trlx submit. sbatch can submit it again: the run goes on from its newest checkpoint.",
            "#",
            *(f"#SBATCH {shlex.quote(option)}" for option in options),
            "",
            LIBRARY.read_text(encoding="utf-8"),
            *request.environment(folder),
            *servers,
            *setup,
            f"run trlx {shlex.join(words)} {last}",
            "",
        ]
    )
