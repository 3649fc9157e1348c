"""Settings in YAML files, with interpolations."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trlx.registry import methods
from trlx.strict import ConfigError


def read_yaml(*files: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """YAML files and mappings merged left to right, then dotted overrides, with interpolations resolved.

    Raises:
        ConfigError: a file is not YAML or has no sections, an override has no value, or an interpolation has no target.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError
    from yaml import MarkedYAMLError

    register_resolvers()
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"The override {override!r} has no value; write it as section.key=value")
    parts = []
    for file in files:
        try:
            parts.append(OmegaConf.create(file) if isinstance(file, Mapping) else OmegaConf.load(file))
        except MarkedYAMLError as error:
            raise ConfigError(f"{file}, line {error.problem_mark.line + 1}, is not YAML: {error.problem}") from None
        if not OmegaConf.is_dict(parts[-1]):
            raise ConfigError(f"{file} must have sections with settings, e.g. train: {{seed: 1}}")
    whole = OmegaConf.merge(*parts, OmegaConf.from_dotlist(list(overrides)))
    try:
        return OmegaConf.to_container(whole, resolve=True)
    except InterpolationResolutionError as error:
        raise ConfigError(
            f"{', '.join(str(file) for file in files if not isinstance(file, Mapping))}: {error}"
        ) from error


def register_resolvers() -> None:
    """Registers with OmegaConf the functions that configs may call: ``${multiply:4, ${.hidden_size}}``, as in NeMo, and
    ``${nemo_trainer:${method.name}}``, the name of a method's NeMo trainer."""
    from omegaconf import OmegaConf

    with warnings.catch_warnings():  # 2.4 calls it register_resolver, which in 2.3 is the name of something else
        warnings.simplefilter("ignore", UserWarning)
        OmegaConf.register_new_resolver("multiply", operator.mul, replace=True)
        OmegaConf.register_new_resolver("nemo_trainer", _nemo_trainer, replace=True)


def _nemo_trainer(method: str) -> str:
    written = {name.lower(): name for name in methods.names()}  # a config may name its method in any case
    return f"NeMo{written.get(method.lower(), method).removesuffix('Config')}Trainer"
