"""Named configurations that ship with the library, as YAML files in ``configs/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlx.config import SECTIONS, TRLConfig, merged, nested, register_resolvers
from trlx.strict import ConfigError, suggestion
from trlx.tracebacks import short_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig

METHODS = ("ppo", "ilql", "sft", "rft")
"""Presets with the default configuration of a method."""
MEGATRON = "megatron_"
"""Presets that begin so describe a model and its layout, and go over a method's preset."""


@short_errors
def load_preset(name: str | Path, *more: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> TRLConfig:
    """The preset `name`, with further presets or YAML files merged over it, then dotted overrides.

    Example: ``load_preset("ppo", overrides=["method.gamma=0.99"])``.

    Raises:
        ValueError: there is no such preset; the message lists those there are. Or it is only a part of a configuration.
    """
    paths = [preset_path(part) for part in (name, *more)]
    if len(paths) == 1 and str(name).startswith(MEGATRON):
        raise ConfigError(f'{name} has no method: write load_preset("ppo", "{name}"), or another method\'s preset')
    return TRLConfig.load_yaml(*paths, overrides=overrides)


def over_preset(settings: Mapping[str, Any], method: str) -> TRLConfig:
    """The config that `settings`, nested or dotted, make on top of a preset, or on their own if they have all sections.

    Args:
        method: name of the preset, unless ``method.name`` in `settings` chooses another.

    Raises:
        ConfigError: a setting is unknown or wrong.
    """
    if set(SECTIONS) <= set(settings):
        return TRLConfig.from_dict(settings)
    settings = nested(settings)
    name = str(settings.get("method", {}).get("name", method)).lower().removesuffix("config")
    base = load_preset(name if name in METHODS else method).to_dict()
    if name not in METHODS:
        base["method"] = {}  # a method of the user's own, with other fields than the preset's
    return TRLConfig.from_dict(merged(base, settings))


def megatron_preset(name: str | Path) -> DictConfig:
    """The settings in NeMo's shape (``trainer``, ``exp_manager``, ``model``) of a preset or file, interpolations as
    they are written. The preset may be called by its file's name, as in ``"megatron_20b.yaml"``.

    Raises:
        ValueError: there is no such preset or file.
    """
    from omegaconf import OmegaConf

    register_resolvers()
    stem = str(name).removesuffix(".yaml")
    is_preset = stem in _presets() and not Path(name).is_file()
    config = OmegaConf.load(preset_path(stem if is_preset else str(name)))
    # a preset is a part of a TRLConfig, a file of NeMo's is not
    inner = OmegaConf.select(config, "train.trainer_kwargs.megatron_cfg")
    return config if inner is None else OmegaConf.create(OmegaConf.to_container(inner))


def preset_path(name: str | Path) -> Path:
    """The YAML file of a preset; a path to an existing file stands for itself."""
    if not isinstance(name, (str, Path)):
        raise ConfigError(f'A preset has a name, e.g. load_preset("ppo").evolve(train={{"seed": 1}}), got {name!r}')
    name = str(name)
    file, presets = Path(name), _presets()
    if file.is_file():
        return file
    if file.suffix in (".yaml", ".yml") or file.name != name:
        folder = file.absolute().parent
        raise ValueError(
            f"There is no file {file.name} in {folder}" + ("" if folder.is_dir() else ", which is no folder")
        )
    if name not in presets:
        raise ValueError(f"Unknown preset {name!r}.{suggestion(name, presets)} Known: {', '.join(sorted(presets))}")
    return presets[name]


def default_ppo_config() -> TRLConfig:
    """The default configuration of PPO."""
    return load_preset("ppo")


def default_ilql_config() -> TRLConfig:
    """The default configuration of ILQL."""
    return load_preset("ilql")


def default_sft_config() -> TRLConfig:
    """The default configuration of supervised fine-tuning."""
    return load_preset("sft")


def default_rft_config() -> TRLConfig:
    """The default configuration of rejection fine-tuning."""
    return load_preset("rft")


def _presets() -> dict[str, Path]:
    return {path.stem: path for path in _folder().glob("*.yaml")}


def _folder() -> Path:
    here = Path(__file__).parent
    # a wheel carries the presets inside the package; a checkout has them beside it
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
