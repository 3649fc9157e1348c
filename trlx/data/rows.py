"""Lists of rows from `datasets.Dataset`, pandas tables and other sequences, without an import of these libraries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

COLUMNS = (("messages",), ("text",), ("prompt", "completion"), ("prompt", "output"), ("prompt", "response"))
"""The sets of columns that samples can be read from."""


def as_list(data: Any, name: str) -> list[Any]:
    """The rows of a list, a ``datasets.Dataset`` (as dicts), a pandas table (as dicts) or another sequence.

    Raises a TypeError, which calls the rows `name`, if `data` is one text or dict, such as a ``DatasetDict``.
    """
    if isinstance(data, (str, Mapping)):
        splits = ": pass one of its data sets" if hasattr(data, "column_names") else ""
        raise TypeError(f"{name} must be a list of {name}, not one {type(data).__name__}{splits}")
    if hasattr(data, "iterrows"):  # iterating over a pandas table gives its column names
        return data.to_dict("records")
    return list(data) if isinstance(data, Iterable) else [data[index] for index in range(len(data))]


def columns_of(data: Any) -> set[str]:
    """The columns of a data set or table, or the keys of a list's first row; none if its rows are no dicts."""
    first = data[0] if isinstance(data, (list, tuple)) and data else None
    return set(getattr(data, "column_names", getattr(data, "columns", first if isinstance(first, Mapping) else ())))


def check_columns(rows: list[Any], columns: Iterable[str], why: str = "") -> None:
    """Checks that each row is a dict with a value for all `columns`.

    Raises:
        ValueError: a row is not; the message ends the sentence "Sample 3 must have ..." with `why`.
    """
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or any(row.get(column) is None for column in columns):
            raise ValueError(f"Sample {index} must have {' and '.join(columns)}{why}, got {repr(row)[:80]}")


def sample_list(samples: Any) -> list[Any]:
    """Samples as texts, dialogues and chats. Rows with columns become what their columns say.

    ``text`` is a text; ``prompt`` with ``completion``, ``output`` or ``response`` is a dialogue, or a chat if both are
    lists of messages; ``messages`` is a chat. Other columns are ignored. Raises a ValueError if the columns cannot be
    read in exactly one way, or if a row lacks a value.
    """
    rows = as_list(samples, "samples")
    if not rows or not isinstance(rows[0], Mapping):
        return rows
    found = [columns for columns in COLUMNS if set(columns) <= rows[0].keys()]
    if len(found) != 1:
        raise ValueError(
            f"samples have the columns {', '.join(map(str, rows[0]))}, and trlx knows {len(found) or 'no'} "
            f'way{"s" * (len(found) > 1)} to read them: keep "text", "prompt" with one of "completion", "output" and '
            '"response", or "messages"'
        )
    content, *answer = found[0]
    check_columns(rows, found[0], " as sample 0 has")
    if not answer:
        return [row[content] for row in rows]
    pairs = [(row[content], row[answer[0]]) for row in rows]
    return [[prompt, output] if isinstance(prompt, str) else [*prompt, *output] for prompt, output in pairs]
