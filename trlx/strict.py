"""Dataclasses that refuse wrong keys, wrong types and values out of range, with a sentence that says what to write."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import os
import re
import types
import typing
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Union

from trlx.compat.settings import HERE


class ConfigError(ValueError):
    """A setting is unknown, missing, of the wrong type or out of range. The message names its dotted key."""


class _Sealing(ABCMeta):
    def __call__(cls, *args: Any, **kwargs: Any):
        section = super().__call__(*args, **kwargs)
        section._sealed = True
        return section


class Section(metaclass=_Sealing):
    """Base of the config dataclasses: checks a field's type whenever it is set, and its value in `check`.

    After construction only its fields, and names that begin with an underscore, can be set.
    """

    __slots__ = ("_sealed",)  # not in __dict__, which is the settings

    section = "config"
    """The section's name in dotted keys: ``class TrainConfig(Section, section="train")``."""

    def __init_subclass__(cls, section: str | None = None):
        cls.section = section or cls.section

    def __post_init__(self):
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        hints = _hints(type(self))
        if name in hints:
            value = _typed(value, hints[name], f"{self.section}.{name}")
        elif hasattr(self, "_sealed") and not name.startswith("_") and not hasattr(self, name):
            raise unknown_key(self.section, name, hints)
        super().__setattr__(name, value)

    def check(self) -> None:
        """Raises ConfigError where a value is out of range; called at construction, and when a trainer is built."""

    def require(self, condition: bool, name: str, rule: str) -> None:
        """Raises unless `condition`; `rule` completes the sentence "<key> must ..."."""
        if not condition:
            rule += ", or null" if type(None) in typing.get_args(_hints(type(self)).get(name)) else ""
            raise ConfigError(f"{self.section}.{name} must {rule}, got {getattr(self, name)!r}")

    def require_range(self, low: float, *names: str, high: float = math.inf) -> None:
        """Raises where a value lies outside [low, high]; a field that may be null passes as null."""
        rule = f"be at least {low}" if high == math.inf else f"be between {low} and {high}"
        for name in names:
            value = getattr(self, name)
            self.require(value is None or low <= value <= high, name, rule)

    def require_positive(self, *names: str) -> None:
        """Raises where a value is not above 0; a field that may be null passes as null."""
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "be positive")

    def require_choice(self, name: str, choices: Iterable[Any]) -> None:
        """Raises unless the value, or each one of a list, is one of `choices`; suggests the nearest one."""
        choices = list(choices)
        given = getattr(self, name)
        for value in given if isinstance(given, list) else [given]:
            if value in choices:
                continue
            near, known = suggestion(value, choices), ", ".join(map(str, choices))
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
            raise unknown_key(where, key, fields)
    none = dataclasses.MISSING
    required = [name for name, field in fields.items() if field.default is none and field.default_factory is none]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"Missing: {', '.join(f'{where}.{name}' for name in missing)}")
    return cls(**values)


def unknown_key(where: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that the section `where` does not have; "" stands for the whole configuration."""
    kind, key = ("key", f"{where}.{name}") if where else ("section", name)
    here = called_here(key)
    if here is not None:
        # a key may have another name in each method
        in_section = [text for text in here.split(" or ") if text.startswith(f"{where}.")]
        fitting = [text for text in in_section if re.split(r"\W", text.removeprefix(f"{where}."))[0] in known]
        if in_section and not fitting:
            return ConfigError(f"Unknown {kind} '{key}', but other methods have {here}. Known: {', '.join(known)}")
        return ConfigError(f"Unknown {kind} '{key}': write {' or '.join(fitting) or here} instead")
    return ConfigError(f"Unknown {kind} '{key}'.{suggestion(name, known)} Known: {', '.join(known) or 'none'}")


def check_keywords(
    function: Callable, given: Iterable[str], where: str, ours: Iterable[str] = (), besides: Iterable[str] = ()
) -> None:
    """Makes sure that `function` takes the keywords `given`.

    Args:
        where: dotted key of the names, for the message.
        ours: parameters that the library passes, so a config cannot.
        besides: further names that are allowed.

    Raises:
        ConfigError: a keyword is unknown; the message names the nearest.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [*besides, *(parameter.name for parameter in parameters if parameter.name not in ours)]
    for name in given:
        if name not in known:
            raise unknown_key(where, name, known)


def called_here(key: str) -> str | None:
    """What to write for a key of another library, or for a key in the wrong section; None where it is not known."""
    name = key.rpartition(".")[2]
    sections = [cls.section for cls in Section.__subclasses__() if name in _hints(cls)]
    here = HERE.get(name) or (f"{sections[0]}.{name}" if len(sections) == 1 else None)
    return None if here == key else here


def suggestion(word: Any, known: Iterable[Any]) -> str:
    """ " Did you mean 'x'?" for the nearest of `known`, or nothing."""
    names = {str(name).lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f" Did you mean '{names[close[0]]}'?" if close else ""


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The annotated type of every field."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _typed(value: Any, hint: Any, key: str) -> Any:
    """`value` as the hinted type: an int becomes a float, a tuple a list, a path a str, where the hint asks for it."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(option is Any for option in options):
        return value
    kinds = [type(None) if option is None else (typing.get_origin(option) or option) for option in options]
    if any(type(value) is kind for kind in kinds):
        return value
    number = _number(value, kinds)
    if number is not None:
        return number
    if isinstance(value, os.PathLike) and str in kinds:
        return str(value)
    if isinstance(value, tuple) and list in kinds:
        return list(value)
    if isinstance(value, Mapping) and dict in kinds:
        return dict(value)
    expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ConfigError(f"{key} must be {expected}, got {value!r} ({type(value).__name__})")


def with_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the texts that are numbers as numbers: YAML reads ``1e-4`` as a text."""
    settings = dict(settings)
    for name, value in settings.items():
        with suppress(ValueError):
            settings[name] = float(value) if isinstance(value, str) else value
    return settings


def _number(value: Any, kinds: list[type]) -> int | float | None:
    # a bool is an int in Python, but `epochs: true` is a mistake; numpy's numbers are numbers
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    is_whole = isinstance(value, numbers.Integral) or (float not in kinds and float(value).is_integer())
    if int in kinds and is_whole:
        return int(value)
    return float(value) if float in kinds else None
