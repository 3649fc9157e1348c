"""Lists of rows from `datasets.Dataset`, pandas tables and other sequences, without an import of these libraries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

COLUMNS = (("messages",), ("text",), ("prompt", "completion"), ("prompt", "output"), ("prompt", "response"))
"""The sets of columns that samples can be read from."""
PREFERENCES = {"dpo": ("chosen", "rejected"), "kto": ("prompt", "completion", "label")}
"""The columns of pairs and of answers with a label, by the preset that learns from them."""


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


def methods_of(samples: Any) -> list[str]:
    """The preset that learns from rows with such keys, for each row of a list, or once for a data set or table."""
    if isinstance(samples, (list, tuple)):
        return [method_of(row) for row in samples]
    return [method_of(dict.fromkeys(getattr(samples, "column_names", getattr(samples, "columns", ()))))]


def method_of(row: Any) -> str:
    """ "dpo" for a pair, "kto" for an answer with a label, "sft" for any other sample."""
    keys = {*row} if isinstance(row, Mapping) else set()
    return next((method for method, columns in PREFERENCES.items() if keys.issuperset(columns)), "sft")


def common_method(samples: Any) -> str:
    """The method of all samples, see `methods_of`. Raises a ValueError if a row has keys of another method's."""
    methods = methods_of(samples) or ["sft"]
    for index, method in enumerate(methods):
        if method != methods[0]:
            this, first = (
                f"the keys {', '.join(map(str, row))}" if isinstance(row, Mapping) else "no keys"
                for row in (samples[index], samples[0])
            )
            raise ValueError(f"Sample {index} has {this}, but sample 0 has {first}: give all samples the same keys")
    return methods[0]


def check_columns(rows: list[Any], columns: Iterable[str], why: str = "") -> None:
    """Checks that each row is a dict with a value for all `columns`.

    Raises:
        ValueError: a row is not; the message ends the sentence "Sample 3 must have ..." with `why`.
    """
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or any(row.get(column) is None for column in columns):
            wanted = f"{' and '.join(columns)}{why}"
            raise ValueError(f"Sample {index} must have {wanted}, got {repr(row)[:80]}{_advice(row, columns)}")


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
            f'"response", or "messages"{_advice(rows[0])}'
        )
    content, *answer = found[0]
    check_columns(rows, found[0], " as sample 0 has")
    if not answer:
        return [row[content] for row in rows]
    pairs = [(row[content], row[answer[0]]) for row in rows]
    return [[prompt, output] if isinstance(prompt, str) else [*prompt, *output] for prompt, output in pairs]


def _advice(row: Any, columns: Iterable[str] = ()) -> str:
    """The end of an error about a row that a method of `columns` cannot read: the preset of another method that can."""
    method = method_of(row)
    if method == "sft" or {*PREFERENCES[method]} <= {*columns}:
        return ""
    return f"; this is {'a pair' if method == 'dpo' else 'an answer with a label'}: write config='{method}'"
