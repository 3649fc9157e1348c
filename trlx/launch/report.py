"""``trlx report``: the page of runs and, with matplotlib, a run's curves as a picture; tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trlx.launch.curves import draw
from trlx.optional import is_available
from trlx.report.page import write_page
from trlx.report.records import read_metrics
from trlx.tracking import PICTURE


def write_report(folder: Path, title: str) -> tuple[Path, ...]:
    """Writes ``report.html`` and, with matplotlib, ``report.png`` into a run's folder.

    Returns:
        The paths of what was written: the picture, if there is one, and the page.

    Raises:
        FileNotFoundError: there are no metrics in `folder`.
    """
    return write_reports([folder], title)


def write_reports(folders: Sequence[Path], title: str | None = None, out: Path | None = None) -> tuple[Path, ...]:
    """Writes the page of `write_page`, whose arguments it takes; of a single run the picture of its curves, too.

    Returns:
        The paths of what was written, the page last.
    """
    page = write_page(folders, title, out)
    if len(folders) > 1 or not is_available("matplotlib"):
        return (page,)
    png = page.with_suffix(Path(PICTURE).suffix)
    draw(read_metrics(folders[0]), title or Path(folders[0]).resolve().name, png)
    return png, page


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Prints a table; floats get four digits, and None an empty cell."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    printed = Table(*columns, title=title)
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value) for value in row]
        # as Text, since rich reads [square brackets] in a str as markup
        printed.add_row(*(Text(cell, overflow="fold") for cell in cells))
    Console().print(printed)
