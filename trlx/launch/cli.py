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
