"""``trlx generate``: samples from what was trained, or from a model of the hub."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trlx import logging
from trlx.data.chat import is_chat
from trlx.data.store import own_rows
from trlx.launch.job import become, check_processes, option_words, torchrun
from trlx.launch.sources import read_rows, with_prompts
from trlx.launch.trained import Source, ending_turns, find, sampler, use_device
from trlx.run.failures import for_users
from trlx.sampling.texts import Respond
from trlx.trainer.base import Trainer

logger = logging.get_logger(__name__)

Row = dict[str, Any]


@dataclass
class Request:
    """What was typed; the fields are the options of the command."""

    checkpoint: str
    tokenizer: str | None = None
    prompt: list[str] = field(default_factory=list)
    prompts: str | None = None
    column: list[str] = field(default_factory=list)
    chat: bool = False
    number: int = 1
    gen: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    out: str | None = None
    json: bool = False
    batch_size: int = 32
    device: str | None = None
    seed: int = 0
    tp: int | None = None
    pp: int | None = None

    def words(self) -> list[str]:
        """The command line of this request, without the program."""
        return ["generate", self.checkpoint, *option_words(self, 1)]

    def rows(self) -> list[Row]:
        """The prompts, each `number` times, with the other columns of their file.

        Raises:
            ValueError, OSError, ImportError: there are none, or they cannot be read.
        """
        rows: list[Any] = list(self.prompt)
        if self.prompts is not None:
            rows += with_prompts(read_rows(self.prompts, self.column), self.prompts)
        if not rows:
            raise ValueError("There are no prompts: add --prompt TEXT or --prompts FILE, or pipe lines of text")
        rows = [dict(row) if isinstance(row, Mapping) else {"prompt": row} for row in rows]
        if self.chat:
            rows = [{**row, "prompt": _as_chat(row["prompt"])} for row in rows]
        return [row for row in rows for _ in range(self.number)]

    def check(self) -> None:
        """Raises ValueError if a number is wrong, or what `out` names cannot be written."""
        for name in ("batch_size", "number"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.out is not None and Path(self.out).is_dir():
            raise ValueError(f"--out is {self.out}, which is a folder: name a file in it")
        if self.out is not None and not Path(self.out).absolute().parent.is_dir():
            raise ValueError(f"--out is {self.out}, but there is no folder {Path(self.out).parent}")


def run(request: Request, processes: int | None = None) -> int:
    """Samples, and prints or writes each prompt with its response; returns an exit status.

    Raises:
        ValueError, TypeError, OSError, ImportError: what was typed, a file or a setting is wrong.
    """
    check_processes(processes)
    request.check()
    if not request.prompt and request.prompts is None and not sys.stdin.isatty():
        request.prompt = [line for line in sys.stdin.read().splitlines() if line.strip()]
    rows = request.rows()
    if (processes or 1) > 1:
        find(request.checkpoint)
        become(torchrun(request, processes))
    _sample(request, rows)
    return 0


@for_users
def _sample(request: Request, rows: list[Row]) -> None:
    use_device(request.device)
    source = find(request.checkpoint)
    layout = {"tensor_model_parallel_size": request.tp, "pipeline_model_parallel_size": request.pp}
    trainer = sampler(source, request.gen, request.stop, request.tokenizer, layout, request.seed)
    out = request.out if trainer.backend.is_main else os.devnull
    show = _as_json if request.json or request.out else _as_text
    with nullcontext(sys.stdout) if out is None else open(out, "w", encoding="utf-8") as file:
        for row in _answered(trainer, source, rows, request.batch_size):
            print(show(row), file=file, flush=True)
    if request.out is not None:
        logger.info(f"{len(rows)} responses: {request.out}")


def _answered(trainer: Trainer, source: Source, rows: list[Row], batch_size: int) -> Iterator[Row]:
    """Each row with its response as "output", in order, batch by batch. Iterate to the end on every process."""
    sampling, backend = trainer.sampling(trainer.sampling_kwargs), trainer.backend
    if is_chat(rows[0]["prompt"]):
        sampling = ending_turns(sampling, source)
    respond = Respond(trainer.draw, trainer.tokenizer, backend.row_format, sampling)
    size = batch_size * backend.data_size
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        mine = [row["prompt"] for row in batch[own_rows(len(batch), backend.data_rank, backend.data_size)]]
        # a process without prompts takes part, as weights may be gathered
        texts = respond.texts(mine) if mine else trainer.draw([], sampling)
        yield from ({**row, "output": text} for row, text in zip(batch, backend.gather_objects(texts), strict=True))


def _as_json(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)


def _as_text(row: Row) -> str:
    prompt = row["prompt"]
    if is_chat(prompt):
        prompt = "\n".join(f"{message['role']}: {message.get('content')}" for message in prompt)
    return "".join(f"> {line}\n" for line in str(prompt).splitlines()) + f"{row['output']}\n"


def _as_chat(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
