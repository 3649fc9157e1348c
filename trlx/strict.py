"""Dataclasses that refuse wrong keys, wrong types and values out of range, with a sentence that says what to write."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Union


class ConfigError(ValueError):
    """A setting is unknown, missing, of the wrong type or out of range. The message names its dotted key."""


class Section:
    """Base of the config dataclasses: checks every field's type, then the section's own ``check()``."""

    section = "config"
    """The section's name in dotted keys."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            key = f"{self.section}.{field.name}"
            setattr(self, field.name, _typed(value, hints[field.name], key))
        self.check()

    def check(self) -> None:
        """Raises ConfigError where a value is out of range."""

    def require(self, condition: bool, name: str, rule: str) -> None:
        """Raises unless `condition`; `rule` completes the sentence "<key> must ..."."""
        if not condition:
            raise ConfigError(f"{self.section}.{name} must {rule}, got {getattr(self, name)!r}")

    def require_choice(self, name: str, choices: Iterable[Any]) -> None:
        """Raises unless the value is one of `choices`; suggests the nearest one."""
        choices = list(choices)
        value = getattr(self, name)
        if value not in choices:
            known = ", ".join(str(choice) for choice in choices)
            near = suggestion(value, choices)
            raise ConfigError(f"{self.section}.{name}: unknown value {value!r}.{near} Known: {known}")


def build(cls: type, values: Mapping[str, Any], where: str):
    """An instance of the dataclass `cls` from a mapping.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), missing, or has a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping of settings, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"Unknown key '{where}.{key}'.{suggestion(key, fields)} Known: {', '.join(fields)}")
    missing = [name for name, field in fields.items() if name not in values and _has_no_default(field)]
    if missing:
        raise ConfigError(f"Missing: {', '.join(f'{where}.{name}' for name in missing)}")
    return cls(**values)


def suggestion(word: Any, known: Iterable[Any]) -> str:
    """ " Did you mean 'x'?" for the nearest of `known`, or nothing."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _typed(value: Any, hint: Any, key: str) -> Any:
    """`value`, as the hinted type: an int becomes a float where a float is asked for, a tuple a list."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(option is Any for option in options):
        return value
    kinds = [type(None) if option is None else (typing.get_origin(option) or option) for option in options]
    if any(type(value) is kind for kind in kinds):
        return value
    # bool is an int to Python, but `epochs: true` is a slip of the pen
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    if isinstance(value, tuple) and list in kinds:
        return list(value)
    if isinstance(value, Mapping) and dict in kinds:
        return dict(value)
    expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ConfigError(f"{key} must be {expected}, got {value!r} ({type(value).__name__})")
