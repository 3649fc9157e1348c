"""``trlx submit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trlx.launch.cli import train
from trlx.launch.cli.tools import example

if TYPE_CHECKING:
    from trlx.launch.job import Job

commands = typer.Typer()

EXAMPLES = example(
    "trlx submit ppo --model gpt2 --prompts p.jsonl --reward made --time 8:00:00",
    "trlx submit sft mine.yaml --samples s.jsonl --nodes 4 --gpus-per-node 8",
)


@commands.command("submit", epilog=EXAMPLES, context_settings={"ignore_unknown_options": True})
def submit(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="WORDS", help="presets, files, settings and options of trlx train")
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N")] = 1,
    gpus_per_node: Annotated[int, typer.Option(metavar="N", help="each has a process; 0: one, on CPUs")] = 1,
    cpus: Annotated[int, typer.Option(metavar="N", help="cores of each process")] = 8,
    time: Annotated[str | None, typer.Option(metavar="[D-]H:M:S", help="limit of each start")] = None,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="  [default: SLURM's]")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION=VALUE", help="another option of sbatch; repeat")
    ] = None,
    save_before: Annotated[int, typer.Option(metavar="SECONDS", help="saves so long before the limit")] = 300,
    requeues: Annotated[int, typer.Option(metavar="N", help="starts again at most so often")] = 100,
    container: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="for pyxis, or apptainer:IMAGE or FILE.sif")
    ] = None,
    conda: Annotated[str | None, typer.Option(metavar="ENV", help="a conda environment")] = None,
    venv: Annotated[str | None, typer.Option(metavar="FOLDER", help="  [default: the active environment]")] = None,
    vllm_nodes: Annotated[int, typer.Option(metavar="N", help="more nodes, for vLLM servers")] = 0,
    vllm_python: Annotated[str, typer.Option(metavar="FILE", help="an interpreter with vLLM")] = "python",
    array: Annotated[Path | None, typer.Option(metavar="SWEEP.yaml", help="a job for each trial of a sweep")] = None,
    follow: Annotated[bool, typer.Option(help="print the log until it ends")] = True,
    follow_job: Annotated[str | None, typer.Option(metavar="JOB", help="follow this job, and submit none")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, and print the batch script")] = False,
) -> int:
    """trlx train in a job of SLURM that saves before its limit and goes on by itself."""
    if follow_job is not None:
        from trlx.launch.slurm.follow import follow as run

        return run(follow_job)
    from trlx.launch.slurm.request import Request
    from trlx.launch.slurm.submit import submit as run

    request = Request(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus=cpus,
        time=time,
        partition=partition,
        sbatch=sbatch or [],
        save_before=save_before,
        requeues=requeues,
        container=container,
        conda=conda,
        venv=venv,
        vllm_nodes=vllm_nodes,
        vllm_python=vllm_python,
    )
    return run(_job(words or []), request, array, dry_run, follow)


def _job(words: list[str]) -> Job:
    """The job of ``trlx train WORDS``; also of ``trlx WORDS``, as if submit stood before it."""
    from trlx.launch.job import Job

    words = words[1:] if words[:1] == ["train"] else words
    given = typer.main.get_command(train.commands).commands["train"].make_context("trlx submit", words).params
    if given.pop("processes") is not None:
        raise ValueError("--processes is for one machine: write --nodes and --gpus-per-node")
    del given["dry_run"]
    return Job("train", **{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()})
