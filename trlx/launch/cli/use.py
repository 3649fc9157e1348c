"""Commands that use what is trained or installed: generate, chat, demo, env."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trlx.launch.cli.tools import example

commands = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="JSON in place of text")]


@commands.command("demo", epilog=example("trlx demo", "trlx demo --method grpo --out runs/demo"))
def demo(
    method: Annotated[str, typer.Option(metavar="METHOD", help="ppo, grpo or ilql")] = "ppo",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="folder of all that is written")] = Path(
        "ckpts/randomwalks"
    ),
    seed: Annotated[int, typer.Option(help="of weights, samples and batches")] = 1000,
) -> int:
    """Watch a method learn: a small GPT-2 finds shortest paths in a graph, offline and on a CPU, in minutes."""
    from trlx.launch.demo import run

    run(method, out, seed)
    return 0


@commands.command("env", epilog=example("trlx env", "trlx env --json > environment.json"))
def env(as_json: Json = False) -> int:
    """What a report of a bug needs: versions, machine, and the variables of the environment that trlx reads."""
    from trlx.report.environment import lines

    print(*lines(as_json), sep="\n")
    return 0
