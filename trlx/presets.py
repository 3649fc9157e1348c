"""Named configurations that ship with the library, as YAML files in ``configs/``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlx import logging
from trlx.compat.settings import PRESETS
from trlx.config import SECTIONS, TRLConfig, merged, nested
from trlx.model_presets import FOLDER, is_layer, layer_names, layers, layout
from trlx.strict import ConfigError, suggestion
from trlx.tracebacks import short_errors
from trlx.yaml_files import register_resolvers

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.get_logger(__name__)

METHODS = ("ppo", "grpo", "ilql", "sft", "rft", "dpo", "kto", "reward")
"""Presets with the default configuration of a method."""
MEGATRON = "megatron_"
"""Presets that begin so describe a model and how it is divided over GPUs; they are merged over a method's preset."""


@short_errors
def load_preset(name: str | Path, *more: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> TRLConfig:
    """The preset `name`, with further presets, layers or YAML files merged over it, then dotted overrides.

    Example: ``load_preset("ppo", overrides=["method.gamma=0.99"])``, ``load_preset("grpo", "qwen3-4b", "8gpu")``.
    Layers (`trlx.model_presets`) may stand in any order; all of them go where the first one stands.

    Raises:
        ValueError: the preset is unknown (the message lists all), or is only a part of a configuration.
    """
    config = TRLConfig.load_yaml(*preset_parts(name, *more), overrides=overrides)
    _say_how_to_start([name, *more])
    return config


def preset_parts(name: str | Path, *more: str | Path) -> list[Path | dict[str, Any]]:
    """What `load_preset` merges, in this order: files, and the settings of layers.

    Raises:
        ValueError: as in `load_preset`.
    """
    parts = [name, *more]
    chosen = [str(part) for part in parts if is_layer(part)]
    files: list[Any] = [preset_path(part) for part in parts if not is_layer(part)]
    if is_layer(name) or (len(parts) == 1 and not has_method(name)):
        written = ", ".join(f'"{part}"' for part in parts)
        raise ConfigError(f'{name} has no method: write load_preset("ppo", {written}), or another method\'s preset')
    if chosen:
        before = parts.index(chosen[0])
        files[before:before] = layers(chosen, TRLConfig.load_yaml(*files[:before]).to_dict())
    return files


def has_method(name: str | Path) -> bool:
    """Whether a preset or file may stand first: others are parts, which go over a method's preset."""
    is_part = is_layer(name) or str(name).startswith(MEGATRON)
    return not is_part or Path(name).is_file()


def over_preset(settings: Mapping[str, Any], method: str) -> TRLConfig:
    """A preset with `settings`, nested or dotted, merged over it; settings of all six sections need no preset.

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
    """The settings in NeMo's form (``trainer``, ``exp_manager``, ``model``) of a preset or file, interpolations
    unresolved. The preset may be called by its file's name, as in ``"megatron_20b.yaml"``.

    Raises:
        ValueError: the preset or file does not exist.
    """
    from omegaconf import OmegaConf

    register_resolvers()
    stem = str(name).removesuffix(".yaml")
    is_preset = stem in _presets() and not Path(name).is_file()
    config = OmegaConf.load(preset_path(stem if is_preset else str(name)))
    # a preset has these settings inside a TRLConfig, a file of NeMo's has them at the top
    inner = OmegaConf.select(config, "train.trainer_kwargs.megatron_cfg")
    return config if inner is None else OmegaConf.create(OmegaConf.to_container(inner))


def preset_path(name: str | Path) -> Path:
    """The YAML file of a preset; a path to an existing file is returned as it is."""
    if not isinstance(name, (str, Path)):
        raise ConfigError(f'A preset has a name, e.g. load_preset("ppo").evolve(train={{"seed": 1}}), got {name!r}')
    name = str(name)
    file, presets = Path(name), _presets()
    if file.is_file():
        return file
    if file.suffix in (".yaml", ".yml") or file.name != name:
        folder = file.absolute().parent
        hint = "" if folder.is_dir() else ", and that folder does not exist"
        raise ValueError(f"There is no file {file.name} in {folder}{hint}")
    if name in PRESETS:
        raise ValueError(f"Unknown preset {name!r}: write {PRESETS[name]}")
    if name not in presets:
        known = [*sorted(presets), *layer_names()]
        raise ValueError(f"Unknown preset {name!r}.{suggestion(name, known)} Known: {', '.join(known)}")
    return presets[name]


# under the names that they have in CarperAI's trlx
default_ppo_config, default_ilql_config, default_sft_config, default_rft_config = (
    partial(load_preset, name) for name in ("ppo", "ilql", "sft", "rft")
)


def _say_how_to_start(parts: list[Any]) -> None:
    chosen = [part for part in parts if is_layer(part)]
    found = layout(chosen) if chosen else None
    if found is not None:
        logger.info(f"{' '.join(chosen)} is made for {found.gpus} GPUs of 80 GB: {found.launch} YOUR_SCRIPT")


def _presets() -> dict[str, Path]:
    return {path.stem: path for path in FOLDER.glob("*.yaml")}
