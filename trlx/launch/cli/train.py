"""``trlx train``, its short forms, and ``trlx config``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trlx.launch.cli.tools import example
from trlx.presets import METHODS

if TYPE_CHECKING:
    from trlx.launch.job import Job

commands = typer.Typer()
config = typer.Typer(help="The settings of a run.", epilog=example("trlx config show ppo"))
commands.add_typer(config, name="config")

SOURCE = "FILE|DATASET"
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="PRESET|FILE|key=value", help="presets, YAML files, dotted settings"),
]
Model = Annotated[str | None, typer.Option(metavar="NAME", help='hub name or folder; "tiny": a small random one')]
Tokenizer = Annotated[str | None, typer.Option(metavar="NAME", help="hub name or folder  [default: the model's]")]
Prompts = Annotated[str | None, typer.Option(metavar=SOURCE, help="what to answer")]
Samples = Annotated[str | None, typer.Option(metavar=SOURCE, help="what to learn from")]
Reward = Annotated[
    str | None, typer.Option(metavar="FUNCTION", help="what scores samples: module:function, a reward model, a URL")
]
Metric = Annotated[str | None, typer.Option(metavar="FUNCTION", help="what evaluations measure: module:function")]
EvalPrompts = Annotated[str | None, typer.Option(metavar=SOURCE, help="prompts of evaluations")]
EvalSamples = Annotated[str | None, typer.Option(metavar=SOURCE, help="samples of evaluations")]
Columns = Annotated[list[str] | None, typer.Option(metavar="KEY=NAME", help="a column's other name; repeat")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="ends a response; repeat")]
Out = Annotated[str | None, typer.Option(metavar="FOLDER", help="checkpoints, metrics and samples")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in --out")]

ABOUT = {
    "train": "Trains a model with the method of a preset or file, or the one that the options ask for.",
    "ppo": "Trains a model with a reward, by PPO.",
    "grpo": "Trains a model with a reward, by GRPO: samples of one prompt are compared.",
    "ilql": "Trains a model on samples with a reward each, by ILQL.",
    "sft": "Trains a model to imitate samples.",
    "rft": "Trains a model with a reward, by imitation of its best samples.",
    "dpo": "Trains a model on pairs of a chosen and a rejected answer, by DPO.",
    "kto": "Trains a model on answers with a label, good or bad, by KTO.",
    "reward": "Trains a reward model on pairs of a chosen and a rejected answer.",
}
ONLINE = ("ppo", "grpo", "rft", "train")
DATA = """
Files are jsonl, json, csv, parquet or txt (a line, a row); a data set of the hub is NAME[:SUBSET][@SPLIT]; "made" is
made in code. --column prompt=question reads the column question as prompt.
"""


def job_of(
    ctx: typer.Context,
    settings: Words = None,
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
    out: Out = None,
    resume: Resume = False,
) -> Job:
    """What the options of these commands say."""
    from trlx.launch.job import Job

    return Job(
        command=ctx.info_name,
        settings=settings or [],
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
        out=out,
        resume=resume,
    )


def about_a_job(command: Callable[..., int]) -> Callable[..., int]:
    """`command` with the options of `job_of` in the place of its first parameter, a `Job`."""
    shared = inspect.signature(job_of, eval_str=True, locals={"Job": Any}).parameters
    _, *own = inspect.signature(command, eval_str=True, locals={"Job": Any}).parameters.values()

    def run(**given: Any) -> int:
        job = job_of(**{name: given.pop(name) for name in shared})
        return command(job, **given)

    run.__signature__ = inspect.Signature([*shared.values(), *own])
    run.__doc__ = command.__doc__
    return run


@about_a_job
def train(
    job: Job,
    processes: Annotated[int | None, typer.Option(metavar="N", help="processes on this machine, by torchrun")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, and print what would run")] = False,
) -> int:
    from trlx.launch.job import run

    return run(job, processes, dry_run)


CHECK = example("trlx check ppo --model tiny", "trlx check sft qwen3-4b 8gpu --samples samples.jsonl --out runs/mine")


@commands.command("check", epilog=CHECK)
@about_a_job
def check(
    job: Job,
    processes: Annotated[int | None, typer.Option(metavar="N", help="as many as the run will have")] = None,
    draw: Annotated[bool, typer.Option("--draw", help="read the model, and judge samples of its own")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of text")] = False,
) -> int:
    """Looks for what would trouble `trlx train` with the same words, without its weights; code 2 if it would fail."""
    from trlx.launch.check import check as look
    from trlx.launch.check import lines

    job.command = "train"
    report = look(job, processes, draw)
    print(*lines(report, as_json), sep="\n")
    return 0 if report.is_good else 2


def _register(name: str) -> None:
    data = "--prompts mine.jsonl --reward judges:brief" if name in ONLINE else "--samples mine.jsonl"
    first = "trlx train rloo" if name == "train" else f"trlx {name}"
    lines = (f"{first} --model tiny", f"{first} --model gpt2 {data}")
    commands.command(name, help=f"{ABOUT[name]}\n\n{DATA}", epilog=example(*lines))(train)


for _name in ("train", *METHODS):
    _register(_name)


@config.command("show", epilog=example("trlx config show ppo train.seed=7", "trlx config show ppo > mine.yaml"))
def show(
    settings: Words = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    out: Out = None,
    resume: Resume = False,
) -> int:
    """The merged settings as YAML, each with where it came from: a preset, a file, the command line, or the default."""
    from trlx.launch.job import Job
    from trlx.launch.settings import lines_of, settings_of

    job = Job("train", model=model, tokenizer=tokenizer, out=out, resume=resume)
    print(*lines_of(settings_of(settings or [], job.typed())), sep="\n")
    return 0
