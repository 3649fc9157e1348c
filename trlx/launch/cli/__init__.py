"""The command line: ``trlx COMMAND``, or ``python -m trlx COMMAND``.

Each module has the commands of one group and declares their arguments. What a command does is in the modules that it
imports when it runs, so that ``trlx --help`` loads no torch.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import trlx
from trlx.launch.cli import cluster, replay, servers, sweep, tools, train, use
from trlx.launch.failures import BAD_INPUT, exit_code, sentence
from trlx.tracebacks import TOLD_ONCE

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""

LOOKS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

app = typer.Typer(rich_markup_mode=None, context_settings=LOOKS)
app.add_typer(train.commands)
app.add_typer(use.commands)
app.add_typer(replay.commands)
app.add_typer(cluster.commands)
app.add_typer(tools.commands)
app.add_typer(sweep.commands)
app.add_typer(servers.commands)


def _version(asked: bool) -> None:
    if asked:
        print(f"trlx {trlx.__version__}")
        raise typer.Exit


@app.callback()
def trlx_(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tunes language models with a reward. Each command has a --help with an example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Raises:
        SystemExit: the command failed. One sentence on stderr says why, unless TRLX_TRACEBACKS is "full"; the code is 2
            for bad input and 1 for a failed run.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(["trlx", *(word for word in words[:1] if not word.startswith("-"))])
    try:
        status = _commands().main(words or ["--help"], prog_name="trlx", standalone_mode=False)
    except typer.TyperException as error:
        name = getattr(getattr(error, "ctx", None), "command_path", name)
        message = " ".join(error.format_message().split())
        _end(f"{name}: {message} See {name} --help", BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("TRLX_TRACEBACKS") == "full":
            raise
        _end(f"{name}: {sentence(error)}", exit_code(error))
    return status if isinstance(status, int) else 0


@functools.cache
def _commands() -> Any:
    return typer.main.get_command(app)


def _end(message: str, code: int) -> NoReturn:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE") if TOLD_ONCE in os.environ else None
    if file is None:
        print(message, file=sys.stderr)
    else:
        Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    end: Any = SystemExit(message)
    end.code = code  # Python would print a code that is a text, and exit with 1
    raise end from None
