"""Commands around training runs: report, plan, convert, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

commands = typer.Typer()


class ManyValues(TyperCommand):
    """A command whose options in `LISTS` take several words: ``--seeds 1 2`` is ``--seeds 1 --seeds 2``."""

    LISTS = ("--set", "--seeds", "--gen")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        option, words = None, []
        for word in args:
            if word.startswith("-"):
                option = word if word in self.LISTS else None
            elif option is not None and words[-1] != option:
                words.append(option)
            words.append(word)
        return super().parse_args(ctx, words)


def example(*lines: str) -> str:
    """The end of a help text."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@commands.command("report", epilog=example("trlx report ckpts/randomwalks/ppo", "trlx report ckpts/ppo ckpts/ilql"))
def report(
    folders: Annotated[list[Path], typer.Argument(help="train.logging_dir of each run, or its train.checkpoint_dir")],
    title: Annotated[str | None, typer.Option(help="headline of the page  [default: the folders' names]")] = None,
    out: Annotated[Path | None, typer.Option(help="the page  [default: report.html or reports.html beside]")] = None,
) -> int:
    """One page about runs: charts, samples, alarms, settings; of a single run a picture of its curves too."""
    from trlx.launch.report import write_reports

    print(*write_reports(folders, title, out), sep="\n")
    return 0


PLAN = example(
    "trlx plan grpo qwen3-4b lora 8gpu train.batch_size=32",
    "trlx plan megatron_20b --gpus 64",
    "trlx plan path/to/llama --method sft --tp 2 --gpus 8",
)


@commands.command("plan", cls=ManyValues, epilog=PLAN)
def plan(
    settings: Annotated[
        list[str], typer.Argument(metavar="PRESET|FILE|FOLDER|key=value", help="as trlx train takes them, or a model")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE...", help="dotted settings")
    ] = None,
    method: Annotated[str, typer.Option(help="preset of the method, where no other comes first")] = "ppo",
    model: Annotated[str | None, typer.Option(metavar="NAME", help="hub name or folder")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs in all  [default: as many as the preset says]")] = None,
    tp: Annotated[int | None, typer.Option(help="tensor ranks")] = None,
    pp: Annotated[int | None, typer.Option(help="pipeline stages")] = None,
    vp: Annotated[int | None, typer.Option(help="chunks of layers per stage")] = None,
    sp: Annotated[bool | None, typer.Option(help="sequence parallelism")] = None,
    vocabulary: Annotated[int, typer.Option(help="tokens of a preset's model")] = 50257,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="of one GPU  [default: that of --gpu]")
    ] = None,
    accelerate: Annotated[
        str | None, typer.Option(help="for an Accelerate trainer: ddp, fsdp2, or a file as in configs/accelerate")
    ] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, l40s or rtx4090, for the time of a step")] = "h100",
    efficiency: Annotated[float, typer.Option(help="the share of the GPU's speed to count on")] = 0.4,
) -> int:
    """Memory, operations and time of what trlx train would run (and a NeMo layout's traffic)."""
    from trlx.launch.plan.tables import GIB
    from trlx.launch.plan.tables import plan as print_plan

    layout = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp,
        "sequence_parallel": sp,
    }
    given = [f"train.trainer_kwargs.{key}={value}" for key, value in layout.items() if value is not None]
    limit = None if gpu_memory is None else gpu_memory * GIB
    words = [*settings, *given, *(overrides or [])]
    print_plan(words, method, model, gpus, vocabulary, limit, accelerate, gpu, efficiency)
    return 0


@commands.command("convert", epilog=example("trlx convert path/to/hf_model model.nemo --tensor 2"))
def convert(
    source: Annotated[Path, typer.Argument(help="a Hugging Face folder, a .nemo file, or an unpacked .nemo file")],
    target: Annotated[Path, typer.Argument(help="what to write: an archive if its name ends in .nemo, else a folder")],
    tensor: Annotated[int, typer.Option(help="tensor ranks of the archive")] = 1,
    pipeline: Annotated[int, typer.Option(help="pipeline stages of the archive")] = 1,
    vocab_size: Annotated[
        int | None, typer.Option(help="number of tokens, if an archive with padding does not say it")
    ] = None,
) -> int:
    """A model between a Hugging Face folder and a .nemo archive."""
    from trlx.launch.convert import convert as write

    write(source=source, target=target, tensor=tensor, pipeline=pipeline, vocab_size=vocab_size)
    print(target)
    return 0


@commands.command("compare", cls=ManyValues, epilog=example("trlx compare my-branch --against main --seeds 1 2 3"))
def compare(
    revision: Annotated[str, typer.Argument(help="a revision as git names it, or REPOSITORY:BRANCH to fetch")],
    against: Annotated[str, typer.Option(metavar="REF", help="the other revision")] = "HEAD",
    script: Annotated[
        list[str] | None, typer.Option(metavar="COMMAND", help="a command to run; may be repeated")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option(metavar="SEED...", help="take the place of {seed} in a script  [default: 1000]")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for metrics and comparison")] = Path("ckpts/compare"),
) -> int:
    """The metrics of scripts at two revisions of a git repository."""
    from trlx.launch.compare import SCRIPTS
    from trlx.launch.compare import compare as run

    print(run(revision, against, script or SCRIPTS, seeds or [1000], out))
    return 0
