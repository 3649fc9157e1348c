"""Commands that use what is trained or installed: generate, chat, demo, env."""

from __future__ import annotations

from typing import Annotated

import typer

from trlx.launch.cli.tools import example

commands = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="JSON in place of text")]


@commands.command("env", epilog=example("trlx env", "trlx env --json > environment.json"))
def env(as_json: Json = False) -> int:
    """What a report of a bug needs: versions, machine, and the variables of the environment that trlx reads."""
    from trlx.report.environment import lines

    print(*lines(as_json), sep="\n")
    return 0
