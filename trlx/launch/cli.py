"""The command line: ``python -m trlx <command>``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Every command is a pair: what adds its arguments, what runs it."""
    parser = argparse.ArgumentParser(prog="python -m trlx", description="Tools around training runs.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_report(commands)
    _add_plan(commands)
    _add_convert(commands)
    args = parser.parse_args(argv)
    return args.run(args)


def _add_report(commands) -> None:
    command = commands.add_parser("report", help="learning curves and samples of a run, as a picture and a page")
    command.add_argument("folder", type=Path, help="the run's train.logging_dir, else its train.checkpoint_dir")
    command.add_argument("--title", help="headline of the page (default: the folder's name)")
    command.set_defaults(run=_run_report)


def _run_report(args: argparse.Namespace) -> int:
    from trlx.launch.report import write_report

    try:
        written = write_report(args.folder, args.title or args.folder.resolve().name)
    except FileNotFoundError as error:
        raise SystemExit(f"trlx report: {error}") from None
    print(*written, sep="\n")
    return 0


def _add_plan(commands) -> None:
    command = commands.add_parser("plan", help="memory and traffic of a NeMo trainer's layout, without running it")
    command.add_argument("model", help="a preset (megatron_20b), a YAML file, or a folder with a Hugging Face model")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings, dotted")
    command.add_argument("--method", default="ppo", help="preset of the method: ppo, ilql or sft (default: ppo)")
    command.add_argument("--gpus", type=int, help="in all (default: as many as the preset says)")
    command.add_argument("--tp", type=int, help="tensor ranks")
    command.add_argument("--pp", type=int, help="pipeline stages")
    command.add_argument("--vp", type=int, help="chunks of layers per stage")
    command.add_argument("--sp", action=argparse.BooleanOptionalAction, help="sequence parallelism")
    command.add_argument("--vocabulary", type=int, default=50257, help="tokens of a preset's model (default: 50257)")
    command.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of one GPU (default: 80)")
    command.set_defaults(run=_run_plan)


def _run_plan(args: argparse.Namespace) -> int:
    from trlx.launch.plan import GIB, plan

    keys = {
        "tensor_model_parallel_size": args.tp,
        "pipeline_model_parallel_size": args.pp,
        "virtual_pipeline_model_parallel_size": args.vp,
        "sequence_parallel": args.sp,
    }
    layout = [f"train.trainer_kwargs.{key}={value}" for key, value in keys.items() if value is not None]
    try:
        plan(args.model, args.method, [*layout, *args.set], args.gpus, args.vocabulary, args.gpu_memory * GIB)
    except (ValueError, OSError) as error:
        raise SystemExit(f"trlx plan: {error}") from None
    return 0


def _add_convert(commands) -> None:
    command = commands.add_parser("convert", help="a model between a Hugging Face folder and a .nemo archive")
    command.add_argument("source", type=Path, help="a Hugging Face folder, a .nemo file or an unpacked one")
    command.add_argument("target", type=Path, help="what to write: an archive if it ends in .nemo, else a folder")
    command.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks of the archive (default: 1)")
    command.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel ranks of the archive (default: 1)")
    command.add_argument("--vocab-size", type=int, help="tokens, where an archive with a padded vocabulary hides them")
    command.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> int:
    from trlx.launch.convert import convert

    try:
        convert(args.source, args.target, tensor=args.tensor, pipeline=args.pipeline, vocab_size=args.vocab_size)
    except (OSError, ValueError) as error:
        raise SystemExit(f"trlx convert: {error}") from None
    print(args.target)
    return 0
