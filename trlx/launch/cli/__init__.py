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
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import trlx
from trlx.launch.cli import cluster, replay, servers, sweep, tools, train, use
from trlx.tracebacks import TOLD_ONCE, on_purpose

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: what was typed, or a file that it names, is wrong; a run failed; Ctrl-C."""

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


def exit_code(error: Exception) -> int:
    """2 if what the user wrote is wrong, else 1."""
    is_input = isinstance(error, (ValueError, TypeError, ImportError, OSError))
    is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError))
    wrong = is_missing or (is_input and not isinstance(error, ChildProcessError) and on_purpose(error))
    return BAD_INPUT if wrong else FAILED


def sentence(error: Exception) -> str:
    """The message of an error, with its type and the way to its traceback where nobody meant it for the user."""
    told = [str(error), *getattr(error, "__notes__", [])]
    if error.__cause__ is not None and error.__cause__.__traceback__ is not None:  # of a function of the user's
        *_, frame = traceback.extract_tb(error.__cause__.__traceback__)
        told[0] += f" ({frame.filename}, line {frame.lineno})"
    if not on_purpose(error):
        told = [f"{type(error).__name__}: {told[0]}", *told[1:], "TRLX_TRACEBACKS=full shows where"]
    return ". ".join(part.rstrip(".") for part in told)


def _end(message: str, code: int) -> NoReturn:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE") if TOLD_ONCE in os.environ else None
    if file is None:
        print(message, file=sys.stderr)
    else:
        Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    end: Any = SystemExit(message)
    end.code = code  # Python would print a code that is a text, and exit with 1
    raise end from None
