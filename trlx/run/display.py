"""What a run prints on its main process: an introduction, a progress bar (in a log file: lines), tables of samples, and
its results."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trlx import logging
from trlx.run import Trainer

logger = logging.get_logger(__name__)

SHOWN = {
    "reward": ("rollout_scores/mean", "scores_mean"),
    "KL": ("policy/kl",),
    "loss": ("losses/loss", "loss"),
    "evaluated": ("reward/mean",),
}
"""The numbers beside the bar, and the metrics they come from. The bar keeps showing the last value of each."""
SECONDS_BETWEEN_LINES = 30.0
"""How often a run without a terminal prints its progress."""


class Display(AbstractContextManager):
    """What one process prints of its run. Only the main process prints; the end of the block closes the bar."""

    def __init__(self, is_main: bool):
        self.is_main = is_main
        self._progress = _Nothing()
        self._shown: dict[str, float] = {}
        self._began = self._last = time.monotonic()
        self._tokens = 0

    def begin(self, trainer: Trainer) -> None:
        """Prints what runs where, and opens the bar. Called on every process."""
        introduction = _introduction(trainer)
        self._began = self._last = time.monotonic()
        if self.is_main:
            logger.info(introduction)
        if self.is_main and logging.is_progress_bar_enabled():
            # a notebook shows a bar as a terminal does
            kind = _Bar if sys.stderr.isatty() or "ipykernel" in sys.modules else _Lines
            self._progress = kind(trainer.schedule.step, trainer.total_steps)

    def speed(self, tokens: int) -> dict[str, float]:
        """The `tokens` of one step, divided by the seconds since the last call; and the seconds since `begin`."""
        before, self._last = self._last, time.monotonic()
        self._tokens += tokens
        rate = tokens / max(self._last - before, 1e-9)
        return {"time/tokens_per_second": rate, "time/elapsed": self._last - self._began}

    def step(self, metrics: dict[str, float]) -> None:
        """Moves the bar by one step."""
        self._take(metrics)
        self._progress.step(self._beside())

    def working(self, text: str) -> None:
        """Shows what is done between two steps, for example "sampling 32/128"."""
        self._progress.working(text)

    def evaluation(self, step: int, metrics: dict[str, float], columns: list[str], rows: list[list[Any]]) -> None:
        """Prints the means of an evaluation and its first samples."""
        self._take(metrics)
        self._progress.show(self._beside())
        means = [f"{name} {value:.4g}" for name, value in metrics.items() if not name.startswith("time/")]
        title = f"Evaluation at step {step}"
        if self.is_main:
            print_samples(f"{title}: {', '.join(means)}" if means else title, columns, rows)

    def end(self, trainer: Trainer) -> None:
        """Closes the bar and prints the results of a finished run."""
        self.__exit__()
        if self.is_main:
            logger.info(_conclusion(trainer, time.monotonic() - self._began))

    def __exit__(self, *_: Any) -> None:
        self._progress.close()
        self._progress = _Nothing()

    def _beside(self) -> str:
        shown = [f"{name} {self._shown[name]:.3g}" for name in SHOWN if name in self._shown]
        average = self._tokens / max(self._last - self._began, 1e-9)
        return ", ".join([*shown, *([f"{average:,.0f} tokens/s"] if self._tokens else [])])

    def _take(self, metrics: dict[str, float]) -> None:
        self._shown |= {name: metrics[key] for name, keys in SHOWN.items() for key in keys if key in metrics}


class _Nothing:
    """Shows no progress."""

    def working(self, text: str) -> None: ...

    step = show = working

    def close(self) -> None: ...


class _Bar(_Nothing):
    """A bar at the bottom of a terminal; without a `total`, a counter."""

    def __init__(self, step: int, total: int | None):
        shape = "{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"  # all in 100 columns
        self.bar = tqdm(total=total, initial=step, bar_format=shape, dynamic_ncols=True)

    def step(self, shown: str) -> None:
        self.show(shown)
        self.bar.update()

    def show(self, shown: str) -> None:
        self.bar.set_description_str(None, refresh=False)
        self.bar.set_postfix_str(shown, refresh=False)

    def working(self, text: str) -> None:
        self.bar.set_description_str(text)

    def close(self) -> None:
        self.bar.close()


class _Lines(_Nothing):
    """Lines for a log file: for the first step, for the last one, and every 30 seconds."""

    def __init__(self, step: int, total: int | None):
        self.steps, self.total, self.resumed_at = step, total, step
        self.began = self.printed = time.monotonic()
        self.waiting: str | None = None

    def step(self, shown: str) -> None:
        self.steps += 1
        left = ""
        if self.total is not None:
            seconds = (time.monotonic() - self.began) / (self.steps - self.resumed_at)
            left = f", {_duration(seconds * (self.total - self.steps))} left"
        self.waiting = f"{_place(self.steps, self.total)}: {shown}{left}"
        if self.steps == self.resumed_at + 1 or self._is_due():
            self._say(self.waiting)

    def working(self, text: str) -> None:
        if self._is_due():
            self._say(f"{_place(self.steps, self.total)}: {text}")

    def close(self) -> None:
        if self.waiting is not None:
            self._say(self.waiting)

    def _is_due(self) -> bool:
        return time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES

    def _say(self, line: str) -> None:
        logger.info(line)
        self.printed, self.waiting = time.monotonic(), None


def print_samples(title: str, columns: list[str], rows: list[list[Any]], max_rows: int = 3) -> None:
    """Prints the first `max_rows` rows as a table, above the bar, on the main process only.

    A terminal gets folded cells of at most 240 characters, a file one line per row and at most 100 characters per cell.
    """
    if not logging.is_main_process():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    is_file = not (console.is_terminal or console.is_jupyter)
    if is_file:
        console = Console(width=10_000)  # nothing is folded
    table = Table(*columns, show_lines=not is_file)
    for row in rows[:max_rows]:
        # rich would read square brackets in a plain string as markup
        table.add_row(*(Text(_cell(value, is_file), overflow="fold") for value in row))
    with tqdm.external_write_mode():
        console.print(Text(title, style="bold"))
        console.print(table)


def _cell(value: Any, is_file: bool) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text, width = (text.replace("\n", "\\n"), 100) if is_file else (text, 240)
    return text if len(text) <= width else f"{text[:width]}…"


def _introduction(trainer: Trainer) -> str:
    """Called on every process, because all count their parameters together."""
    backend, config = trainer.backend, trainer.config
    trained, frozen = backend.parameter_counts()
    model = config.model.model_path
    name = model if isinstance(model, (str, Path)) else f"a new {model.model_type}"
    device = torch.cuda.get_device_name(backend.device) if backend.device.type == "cuda" else backend.device.type
    processes = "1 process" if backend.processes == 1 else f"{backend.processes} processes"
    ends = "total_steps" if trainer.total_steps == config.train.total_steps else "epochs"
    limit = "" if trainer.total_steps is None else f" (train.{ends}: {getattr(config.train, ends)})"
    return _block(
        f"{type(trainer).__name__}, {_place(trainer.schedule.step, trainer.total_steps)}{limit}",
        model=f"{name}: {trained:,} parameters train, {frozen:,} are frozen",
        device=f"{device}, {processes}, {str(backend.precision).removeprefix('torch.')}",
        folder=config.train.checkpoint_dir,
    )


def _conclusion(trainer: Trainer, seconds: float) -> str:
    folder = Path(trainer.config.train.checkpoint_dir)
    lines = {}
    if trainer.best_reward is not None:
        of = "" if trainer.best_step is None else f" at step {trainer.best_step}"
        best = folder / "best_checkpoint" / "hf_model"  # absent if the run resumed from another folder
        where = f": {best}" if trainer.config.train.save_best and best.is_dir() else ""
        name = trainer.best_metric.removesuffix("/mean").rpartition("/")[2]
        lines["best"] = f"{name} {trainer.best_reward:.4g}{of}{where}"
    if trainer.saved is not None:
        lines["weights"] = str(trainer.saved[0] / "hf_model")
    return _block(f"Done: step {trainer.schedule.step}, after {_duration(seconds)}", **lines)


def _place(step: int, total: int | None) -> str:
    return f"step {step}" if total is None else f"step {step}/{total}"


def _block(title: str, **lines: str) -> str:
    return "\n".join([title, *(f"  {name:<8} {text}" for name, text in lines.items())])


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
