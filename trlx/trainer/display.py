"""What a run shows on the terminal of its main process: a progress bar, and tables of samples."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from trlx import logging

SHOWN = ("losses/total_loss", "losses/loss", "loss")
"""Statistics beside the bar."""


class Display:
    """The progress bar of one run and what is printed around it; silent on other processes than the main one."""

    def __init__(self, total_steps: int | None, step: int, is_main: bool):
        self.is_main = is_main
        hidden = not (is_main and logging.is_progress_bar_enabled())
        self.bar = tqdm(total=total_steps, initial=step, disable=hidden, unit="step", dynamic_ncols=True)

    def step(self, metrics: dict[str, float]) -> None:
        """Moves the bar by one step."""
        shown = {name: metrics[name] for name in SHOWN if name in metrics}
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
        self.bar.update()

    def evaluation(self, step: int, metrics: dict[str, float], columns: list[str], rows: list[list[Any]]) -> None:
        """Prints the means of an evaluation and its first samples."""
        if self.is_main:
            print_samples(_title(step, metrics), columns, rows)

    def close(self) -> None:
        """Ends the bar; tables are printed still."""
        self.bar.close()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def print_samples(title: str, columns: list[str], rows: list[list[Any]], max_rows: int = 3) -> None:
    """Prints the first rows as a table, long cells shortened; on the main process only."""
    if not logging.is_main_process():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, show_lines=True)
    for row in rows[:max_rows]:
        # as Text, since square brackets in a string would be read as markup
        table.add_row(*(Text(_cell(value), overflow="fold") for value in row))
    console = Console()
    console.print(Text(title, style="bold"))
    console.print(table)


def _title(step: int, metrics: dict[str, float]) -> str:
    means = [f"{name} {value:.4g}" for name, value in metrics.items() if not name.startswith("time/")]
    return f"Evaluation at step {step}: {', '.join(means)}" if means else f"Evaluation at step {step}"


def _cell(value: Any, width: int = 240) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= width else f"{text[:width]}…"
