"""Reads NeMo config files, and looks up typed values in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trlx.presets import megatron_preset
from trlx.strict import ConfigError, suggestion, unknown_key
from trlx.yaml_files import register_resolvers

WHERE = "megatron_cfg"
"""Prefix of dotted keys in messages."""


def read_megatron_cfg(source: Any) -> dict[str, Any]:
    """The settings as nested dicts, with interpolations resolved.

    Args:
        source: a mapping, an OmegaConf config, a file, a preset's name such as ``"megatron_20b"``, or None.

    Raises:
        ConfigError: `source` is none of these, or an interpolation leads nowhere.
        ValueError: the file or preset does not exist.
    """
    if source is None:
        return {}
    register_resolvers()
    try:
        config = OmegaConf.create(source) if isinstance(source, Mapping) else megatron_preset(source)
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"train.trainer_kwargs.{WHERE}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"train.trainer_kwargs.{WHERE} must be a mapping with trainer and model, got {values!r}")
    return values


@dataclass(frozen=True)
class Lookup:
    """Typed access to the values of a mapping. A null counts as missing."""

    values: Mapping[str, Any]
    where: str
    """Dotted key of the mapping, for messages."""

    def below(self, key: str) -> Lookup:
        """The mapping under `key`; an empty one if it is missing."""
        return Lookup(self.values.get(key) or {}, f"{self.where}.{key}")

    def has(self, key: str) -> bool:
        """Whether `key` is written."""
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is written."""
        return self.values[key] if self.has(key) else default

    def integer(self, key: str, default: Any = None, *, least: int = 1) -> Any:
        """A whole number of at least `least`; 1e6 is allowed."""
        value = self.get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        self.require(value is default or fits, key, f"be a whole number of at least {least}")
        return value

    def number(self, key: str, default: Any = None, *, least: float = float("-inf"), below: float = float("inf")):
        """A number of at least `least` and less than `below`."""
        value = self.get(key, default)
        if value is default:
            return value
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < below
        self.require(fits, key, f"be a number, {least} <= number < {below}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.get(key, default)
        self.require(isinstance(value, bool), key, "be true or false")
        return value

    def choice(self, key: str, default: Any, known: Iterable[Any]) -> Any:
        """One of `known`."""
        value, known = self.get(key, default), list(known)
        if value is not default and value not in known:
            listed = ", ".join(str(choice) for choice in known)
            near = suggestion(value, known)
            raise ConfigError(f"{self.where}.{key}: unknown value {value!r}.{near} Known: {listed}")
        return value

    def either(self, key: str, other: str) -> str:
        """The one of two synonyms that is written; `key` if neither is."""
        if self.has(key) and self.has(other):
            raise ConfigError(f"{self.where} has both {key} and {other}, which mean the same: write one of them")
        return other if self.has(other) else key

    def only(self, *known: str) -> None:
        """Raises for a key that is not in `known`."""
        for key in self.values:
            if self.has(key) and key not in known:
                raise unknown_key(self.where, key, known)

    def require(self, condition: bool, key: str, rule: str) -> None:
        """Raises unless `condition`; `rule` completes the sentence "<key> must ..."."""
        if not condition:
            raise ConfigError(f"{self.where}.{key} must {rule}, got {self.values.get(key)!r}")
