"""``trlx sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trlx.launch.cli.tools import example
from trlx.launch.cli.train import (
    ABOUT,
    Columns,
    EvalPrompts,
    EvalSamples,
    Metric,
    Model,
    Prompts,
    Reward,
    Samples,
    Stop,
    Tokenizer,
)

commands = typer.Typer()

AccelerateConfig = Annotated[
    Path | None, typer.Option("--accelerate_config", metavar="FILE", help="for accelerate launch")
]
Gpus = Annotated[
    int | None, typer.Option("--num_gpus", help="GPUs and processes of a trial  [default: 1 if there is one]")
]
Cpus = Annotated[
    int | None, typer.Option("--num_cpus", help="CPUs of a process  [default: 4, or as many as there are]")
]
Address = Annotated[
    str | None, typer.Option("--server_address", metavar="HOST:PORT", help="a Ray Client server to run on")
]
SWEEP = example(
    "trlx sweep examples/ppo_sentiments.py --config sweep.yaml",
    "trlx sweep ppo --model tiny --config sweep.yaml",
)


@commands.command("sweep", epilog=SWEEP)
def sweep(
    work: Annotated[
        list[str], typer.Argument(metavar="SCRIPT|WORDS", help="a script with main(hparams), or words of trlx train")
    ],
    config: Annotated[Path, typer.Option(help="what to vary, as in configs/sweeps/")],
    accelerate_config: AccelerateConfig = None,
    num_gpus: Gpus = None,
    num_cpus: Cpus = None,
    server_address: Address = None,
    local: Annotated[bool, typer.Option("--local", help="this machine, whatever RAY_ADDRESS says")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of all trials  [default: below ckpts/sweeps]")] = None,
    assume_yes: Annotated[bool, typer.Option("-y", "--assume_yes", help="do not ask before starting")] = False,
    model: Model = None,
    tokenizer: Tokenizer = None,
    prompts: Prompts = None,
    samples: Samples = None,
    reward: Reward = None,
    metric: Metric = None,
    eval_prompts: EvalPrompts = None,
    eval_samples: EvalSamples = None,
    column: Columns = None,
    stop: Stop = None,
) -> int:
    """Many runs with other hyper-parameters, on Ray Tune; the same command with the same --out goes on."""
    from trlx.launch.job import Job
    from trlx.launch.sweep import run

    job = Job(
        command=work[0],
        settings=work[1:],
        model=model,
        tokenizer=tokenizer,
        prompts=prompts,
        samples=samples,
        reward=reward,
        metric=metric,
        eval_prompts=eval_prompts,
        eval_samples=eval_samples,
        column=column or [],
        stop=stop or [],
    )
    is_script = work[0] not in ABOUT
    if is_script and job.words() != work[:1]:
        raise ValueError(
            f"a script takes its settings from {config} alone: leave out {' '.join(job.words()[1:])}, or begin with "
            "train or a method instead of a script"
        )
    return run(
        work=work[0] if is_script else job,
        config=config,
        accelerate_config=accelerate_config,
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        server_address=server_address,
        local=local,
        out=out,
        assume_yes=assume_yes,
    )
