"""``trlx replay``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trlx.launch.cli.tools import example

commands = typer.Typer()

REPLAY = example(
    "trlx replay runs/brief --step 120",
    "trlx replay ckpts --step 7 --tolerance 1e-4 -- accelerate launch train.py",
)


@commands.command("replay", epilog=REPLAY)
def replay(
    run: Annotated[Path, typer.Argument(help="train.logging_dir of the run, or its train.checkpoint_dir")],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="what started the run  [default: as recorded]")
    ] = None,
    step: Annotated[int, typer.Option(help="the last step to compute again")] = ...,
    tolerance: Annotated[float, typer.Option(help="relative difference that counts as none")] = 0.0,
) -> int:
    """Computes a step of a run again, in a folder of its own, and names the first number and tensor that differ."""
    from trlx.launch.replay import replay as again

    return again(run, step, command or [], tolerance)
