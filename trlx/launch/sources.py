"""What the command line names: rows in files and data sets, and reward functions."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trlx.data.rows import as_list
from trlx.optional import require
from trlx.strict import suggestion

DATASET = re.compile(r"(?P<name>[^:@]+)(:(?P<subset>[^@]+))?(@(?P<split>.+))?")
NUMBERS = ("reward", "label", "margin")
"""Columns whose texts are numbers, or true and false: a csv file has texts only."""


def read_rows(source: str, columns: Sequence[str] = (), made: Callable[[], list[Any]] = list) -> list[Any]:
    """The rows of a file (jsonl, json, csv, parquet, txt), of a data set (``NAME[:SUBSET][@SPLIT]``), or of `made`.

    Args:
        source: "made" stands for what `made` returns.
        columns: new names, ``["prompt=question"]``.

    Raises:
        ValueError: the file cannot be read, is empty, or lacks a column.
        FileNotFoundError, ImportError: the file, or a package that reads it, is not there.
    """
    kind = Path(source).suffix.lower()
    if source == "made":
        rows = made()
    elif kind in READERS:
        if not Path(source).is_file():
            raise FileNotFoundError(f"There is no file {source} in {Path.cwd()}")
        rows = READERS[kind](Path(source))
    else:
        rows = _data_set(source)
    if not rows:
        raise ValueError(f"{source} has no rows")
    return _renamed(rows, columns, source)


def with_prompts(rows: list[Any], source: str) -> list[Any]:
    """`rows`, if they are prompts or have a column of them; else raises ValueError."""
    if isinstance(rows[0], Mapping) and "prompt" not in rows[0]:
        raise ValueError(f"{source} has the columns {', '.join(rows[0])}: write --column prompt=NAME for the prompts")
    return rows


def function_of(source: str, option: str) -> Any:
    """The reward function, or metric, that `option` names: ``module:function`` or ``file.py:function`` (a class is
    called without arguments), the address of a server, a folder with a reward model, or "made".

    Raises:
        ValueError: there is no such module, file or function.
    """
    if source == "made":
        from trlx.launch.made import share_of_vowels

        return share_of_vowels
    if source.startswith(("http://", "https://")):
        from trlx.rewards.remote import RemoteReward

        return RemoteReward(source)
    if Path(source).is_dir():
        from trlx.rewards.classifier import SequenceClassifierReward

        return SequenceClassifierReward(source)
    place, _, name = source.rpartition(":")
    if not place:
        raise ValueError(
            f"{option} is {source!r}: write module:function, file.py:function, a folder with a reward model, or made"
        )
    module = _module(place, option)
    if not hasattr(module, name):
        raise ValueError(f"{option}: {place} has no function {name!r}.{suggestion(name, vars(module))}".rstrip("."))
    found = getattr(module, name)
    return found() if isinstance(found, type) else found


def _module(place: str, option: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # an installed script has its own folder there
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):
                raise  # a module that this one imports
            raise ValueError(f"{option}: there is no module {place} in {Path.cwd()}, nor installed") from None
    if not Path(place).is_file():
        raise ValueError(f"{option}: there is no file {place} in {Path.cwd()}")
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _json_lines(path: Path) -> list[Any]:
    lines = [(number, line) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip()]
    return [_parsed(line, f"{path}, line {number},") for number, line in lines]


def _json(path: Path) -> list[Any]:
    rows = _parsed(_text(path), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} must be a JSON list of rows; call it .jsonl if each line is a row")
    return rows


def _csv(path: Path) -> list[Any]:
    return list(csv.DictReader(_text(path).splitlines(keepends=True)))


def _lines(path: Path) -> list[Any]:
    return [line for line in _text(path).splitlines() if line.strip()]


def _parquet(path: Path) -> list[Any]:
    require("pyarrow", extra="data", purpose=f"Reading {path}")
    from pyarrow.parquet import read_table

    return read_table(path).to_pylist()


READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".txt": _lines, ".parquet": _parquet}


def _data_set(source: str) -> list[Any]:
    require("datasets", extra="data", purpose=f"{source}, which is no {', '.join(READERS)} file but a data set,")
    from datasets import load_dataset

    parts = DATASET.fullmatch(source)
    if parts is None:
        raise ValueError(
            f"{source!r} is no name of a data set: write NAME, NAME:SUBSET, NAME@SPLIT or NAME:SUBSET@SPLIT"
        )
    try:
        return as_list(load_dataset(parts["name"], parts["subset"], split=parts["split"] or "train"), "rows")
    except Exception as error:  # of many kinds
        raise ValueError(
            f"{source} is no file, and no data set that can be loaded: {str(error).splitlines()[0]}"
        ) from None


def _renamed(rows: list[Any], columns: Sequence[str], source: str) -> list[Any]:
    names = dict(column.split("=", 1) for column in columns if "=" in column)
    if len(names) < len(columns):
        raise ValueError(f"--column takes KEY=COLUMN, such as prompt=question, got {' '.join(columns)}")
    renamed = []
    for row in rows:
        missing = [column for column in names.values() if isinstance(row, Mapping) and column not in row]
        if missing:
            known = f"{suggestion(missing[0], row)} It has: {', '.join(row)}"
            raise ValueError(f"{source} has no column {missing[0]!r}.{known}")
        if isinstance(row, Mapping):
            kept = {key: value for key, value in row.items() if key not in names.values()}
            row = {**kept, **{key: row[column] for key, column in names.items()}}
            row = {key: _number(key, value) for key, value in row.items()}
        renamed.append(row)
    return renamed


def _number(key: str, value: Any) -> Any:
    if key not in NUMBERS or not isinstance(value, str):
        return value
    try:
        return json.loads(value.strip().lower())
    except json.JSONDecodeError:
        raise ValueError(f"The column {key!r} must have numbers, or true and false, got {value!r}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
