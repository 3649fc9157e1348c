"""Data sets as lists: `datasets.Dataset`, tables and other sequences, without importing what they are made by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

LAYOUTS = (("messages",), ("text",), ("prompt", "completion"), ("prompt", "output"), ("prompt", "response"))
"""Columns that samples can be read from."""


def as_list(data: Any, name: str) -> list[Any]:
    """The rows of a list, a ``datasets.Dataset`` (as dicts), a pandas table (as dicts) or another sequence.

    Args:
        name: what the rows are, e.g. ``"prompts"``.

    Raises:
        TypeError: `data` is one text or dict, such as a ``DatasetDict``, which holds several data sets.
    """
    if isinstance(data, (str, Mapping)):
        splits = ": pass one of its parts" if hasattr(data, "column_names") else ""
        raise TypeError(f"{name} must be a list of {name}, not one {type(data).__name__}{splits}")
    if hasattr(data, "iterrows"):  # iterating over a pandas table gives its column names
        return data.to_dict("records")
    return list(data) if isinstance(data, Iterable) else [data[index] for index in range(len(data))]


def sample_list(samples: Any) -> list[Any]:
    """Samples as texts, dialogues and chats; rows with columns become what their columns say.

    ``text`` is a text, ``prompt`` with ``completion``, ``output`` or ``response`` a dialogue (a chat if both are lists
    of messages), ``messages`` a chat. Other columns are ignored.

    Raises:
        ValueError: none of these columns is there, or there are several ways to read them.
    """
    rows = as_list(samples, "samples")
    if not rows or not isinstance(rows[0], Mapping):
        return rows
    columns = _layout(list(rows[0]))
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or any(row.get(column) is None for column in columns):
            raise ValueError(f"Sample {index} must have {' and '.join(columns)} as sample 0 has, got {repr(row)[:80]}")
    return [_sample(*(row[column] for column in columns)) for row in rows]


def _layout(columns: list[str]) -> tuple[str, ...]:
    found = [layout for layout in LAYOUTS if set(layout) <= set(columns)]
    if len(found) == 1:
        return found[0]
    wanted = '"text", "prompt" with "completion", "output" or "response", or "messages"'
    problem = "none to learn from" if not found else f"{len(found)} ways to read them"
    raise ValueError(
        f"samples have the columns {', '.join(map(str, columns))}, which is {problem}: keep one of {wanted}"
    )


def _sample(content: Any, answer: Any = None) -> Any:
    if answer is None:
        return content
    return [content, answer] if isinstance(content, str) else [*content, *answer]
