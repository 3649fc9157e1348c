"""The command line: ``python -m trlx COMMAND``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    For every command, ``_add_<command>`` declares its arguments and ``_<command>`` runs it. Each imports only what its
    command needs.

    Raises:
        SystemExit: the command refused its arguments, or did not find what it needs; the message is one sentence.
    """
    parser = argparse.ArgumentParser(prog="python -m trlx", description="Tools around training runs.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    _add_report(commands)
    _add_plan(commands)
    _add_convert(commands)
    _add_sweep(commands)
    _add_compare(commands)
    arguments = vars(parser.parse_args(argv))
    command, run = arguments.pop("command"), arguments.pop("run")
    try:
        return run(**arguments)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"trlx {command}: {error}") from None


def _add_report(commands) -> None:
    command = commands.add_parser("report", help="learning curves and samples of a run, as a picture and a page")
    command.add_argument("folder", type=Path, help="train.logging_dir of the run, or its train.checkpoint_dir")
    command.add_argument("--title", help="headline of the page (default: the folder's name)")
    command.set_defaults(run=_report)


def _report(folder: Path, title: str | None) -> int:
    from trlx.launch.report import write_report

    print(*write_report(folder, title or folder.resolve().name), sep="\n")
    return 0


def _add_plan(commands) -> None:
    command = commands.add_parser("plan", help="memory and traffic of a NeMo trainer's layout, without running it")
    command.add_argument("model", help="a preset (megatron_20b), a YAML file, or a folder with a Hugging Face model")
    command.add_argument(
        "--set", nargs="+", action="extend", default=[], dest="overrides", metavar="KEY=VALUE", help="dotted settings"
    )
    command.add_argument(
        "--method", default="ppo", help="preset of the method: ppo, grpo, dpo, reward, ... (default: ppo)"
    )
    command.add_argument("--gpus", type=int, help="GPUs in all (default: as many as the preset says)")
    command.add_argument("--tp", type=int, help="tensor ranks")
    command.add_argument("--pp", type=int, help="pipeline stages")
    command.add_argument("--vp", type=int, help="chunks of layers per stage")
    command.add_argument("--sp", action=argparse.BooleanOptionalAction, help="sequence parallelism")
    command.add_argument("--vocabulary", type=int, default=50257, help="tokens of a preset's model (default: 50257)")
    command.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of one GPU (default: 80)")
    command.set_defaults(run=_plan)


def _plan(model: str, overrides: list[str], method: str, gpus: int | None, **options: Any) -> int:
    from trlx.launch.plan.tables import GIB, plan

    keys = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vp": "virtual_pipeline_model_parallel_size",
        "sp": "sequence_parallel",
    }
    layout = [f"train.trainer_kwargs.{key}={options[name]}" for name, key in keys.items() if options[name] is not None]
    plan(model, method, [*layout, *overrides], gpus, options["vocabulary"], options["gpu_memory"] * GIB)
    return 0


def _add_convert(commands) -> None:
    command = commands.add_parser("convert", help="a model between a Hugging Face folder and a .nemo archive")
    command.add_argument("source", type=Path, help="a Hugging Face folder, a .nemo file, or an unpacked .nemo file")
    command.add_argument("target", type=Path, help="what to write: an archive if its name ends in .nemo, else a folder")
    command.add_argument("--tensor", type=int, default=1, help="tensor ranks of the archive (default: 1)")
    command.add_argument("--pipeline", type=int, default=1, help="pipeline stages of the archive (default: 1)")
    command.add_argument("--vocab-size", type=int, help="number of tokens, if an archive with padding does not say it")
    command.set_defaults(run=_convert)


def _convert(target: Path, **options: Any) -> int:
    from trlx.launch.convert import convert

    convert(target=target, **options)
    print(target)
    return 0


def _add_sweep(commands) -> None:
    command = commands.add_parser("sweep", help="many runs of a script, each with other hyper-parameters")
    command.add_argument("script", help="a file or module that defines main(hparams)")
    command.add_argument("--config", type=Path, required=True, help="what to vary, as in configs/sweeps/")
    command.add_argument("--accelerate_config", type=Path, metavar="FILE", help="for accelerate launch")
    command.add_argument("--num_gpus", type=int, help="GPUs and processes of a trial (default: 1 if there is one)")
    command.add_argument("--num_cpus", type=int, help="CPUs of a process (default: 4, or as many as there are)")
    command.add_argument("--server_address", metavar="HOST:PORT", help="a Ray Client server to run on")
    command.add_argument(
        "--local", action="store_true", help="no Ray: random and grid search, one trial after the other"
    )
    command.add_argument("--out", type=Path, help="folder of all trials (default: a new one below ckpts/sweeps)")
    command.add_argument("-y", "--assume_yes", action="store_true", help="do not ask before starting")
    command.set_defaults(run=_sweep)


def _sweep(**options: Any) -> int:
    from trlx.launch.sweep import run

    return run(**options)


def _add_compare(commands) -> None:
    command = commands.add_parser("compare", help="the metrics of scripts at two revisions of a git repository")
    command.add_argument("revision", metavar="REF", help="a revision as git names it, or REPOSITORY:BRANCH to fetch")
    command.add_argument("--against", default="HEAD", metavar="REF", help="the other revision (default: HEAD)")
    command.add_argument("--script", action="append", metavar="COMMAND", help="a command to run; may be repeated")
    command.add_argument("--seeds", type=int, nargs="+", default=[1000], help="take the place of {seed} in a script")
    command.add_argument("--out", type=Path, default=Path("ckpts/compare"), help="folder for metrics and comparison")
    command.set_defaults(run=_compare)


def _compare(revision: str, against: str, script: list[str] | None, seeds: list[int], out: Path) -> int:
    from trlx.launch.compare import SCRIPTS, compare

    print(compare(revision, against, script or SCRIPTS, seeds, out))
    return 0
