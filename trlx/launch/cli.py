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
    _add_sweep(commands)
    _add_compare(commands)
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
    from trlx.launch.plan.tables import GIB, plan

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


def _add_sweep(commands) -> None:
    command = commands.add_parser("sweep", help="many runs of a script, each with hyper-parameters of its own")
    command.add_argument("script", help="a file or module that defines main(hparams)")
    command.add_argument("--config", type=Path, required=True, help="what to vary, as in configs/sweeps/")
    command.add_argument("--accelerate_config", type=Path, metavar="FILE", help="for accelerate launch")
    command.add_argument("--num_gpus", type=int, help="GPUs, and processes, of a trial (default: 1 where there is one)")
    command.add_argument("--num_cpus", type=int, help="CPUs of a process (default: 4, or as many as there are)")
    command.add_argument("--server_address", metavar="HOST:PORT", help="a Ray Client server to run on")
    command.add_argument(
        "--local", action="store_true", help="without ray: random and grid search, one after the other"
    )
    command.add_argument("--out", type=Path, help="folder of all trials (default: one below ckpts/sweeps)")
    command.add_argument("-y", "--assume_yes", action="store_true", help="do not ask before starting")
    command.set_defaults(run=_run_sweep)


def _run_sweep(args: argparse.Namespace) -> int:
    from trlx.launch.sweep import run

    try:
        return run(**{name: value for name, value in vars(args).items() if name != "run"})
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"trlx sweep: {error}") from None


def _add_compare(commands) -> None:
    command = commands.add_parser("compare", help="the metrics of scripts at two revisions of a git repository")
    command.add_argument("revision", metavar="REF", help="what git calls it, or REPOSITORY:BRANCH to fetch")
    command.add_argument("--against", default="HEAD", metavar="REF", help="the other one (default: HEAD)")
    command.add_argument("--script", action="append", metavar="COMMAND", help="may be repeated; run in this order")
    command.add_argument("--seeds", type=int, nargs="+", default=[1000], help="put for {seed} in a script")
    command.add_argument("--out", type=Path, default=Path("ckpts/compare"), help="folder for metrics and comparison")
    command.set_defaults(run=_run_compare)


def _run_compare(args: argparse.Namespace) -> int:
    from trlx.launch.compare import SCRIPTS, compare

    try:
        print(compare(args.revision, args.against, args.script or SCRIPTS, args.seeds, args.out))
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"trlx compare: {error}") from None
    return 0
