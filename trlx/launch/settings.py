"""The settings of a command: presets, files and ``key=value`` merged, and where each value came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trlx.config import SECTIONS, TRLConfig, flat, nested
from trlx.model_presets import is_layer, layers
from trlx.presets import METHODS, load_preset, over_preset, preset_path
from trlx.yaml_files import read_yaml

TYPED, DEFAULT = "command line", "default"
"""Origins of values; the others are presets and files."""


class Settings(NamedTuple):
    """A config, and by dotted key the origin of each value in it."""

    config: TRLConfig
    origins: dict[str, str]


def settings_of(
    words: Sequence[str], typed: Mapping[str, Any], usual: Mapping[str, Any] | None = None, guess: str = "ppo"
) -> Settings:
    """Merges presets and YAML files left to right, then settings.

    Args:
        words: names of presets and files, and ``section.key=value`` in any order.
        typed: settings by dotted key that options of the command stand for.
        usual: settings by dotted key that all of these go over, but not the presets and files.
        guess: the method's preset below the files, where no preset is named and no file names a method.

    Raises:
        ValueError: a preset or file is unknown, or a setting is unknown or wrong.
    """
    names = [word for word in words if "=" not in word]
    first = [f"{key}={json.dumps(value)}" for key, value in (usual or {}).items()]
    last = [f"{key}={json.dumps(value)}" for key, value in typed.items()] + [word for word in words if "=" in word]
    if names and (any(map(is_layer, names)) or not Path(names[0]).is_file()):
        config = load_preset(*names, overrides=[*first, *last])
        parts = list(_parts(names))
    else:
        settings = read_yaml(*map(preset_path, names), overrides=[*first, *last])
        config = over_preset(settings, guess)
        parts = list(_parts(names))
        if not set(SECTIONS) <= set(settings):
            named = config.method.name.lower().removesuffix("config")
            parts[:0] = _parts([named if named in METHODS else guess])
    parts += [(f"usual for {typed.get('model.model_path')}", nested(usual or {})), (TYPED, read_yaml(overrides=last))]
    return Settings(config, _origins(config, parts))


def lines_of(settings: Settings) -> Iterator[str]:
    """The settings as YAML, each with a comment that says its origin."""
    found = [(f"{'  ' * depth}{text}", origin) for depth, text, origin in _written(settings)]
    width = min(max(len(text) for text, origin in found if origin), 60)
    yield from (f"{text:<{width}}  # {origin}" if origin else text for text, origin in found)


def _written(settings: Settings, where: str = "", depth: int = 0, value: Any = None) -> Iterator[tuple[int, str, str]]:
    """(Depth, text, origin) of each line."""
    for key, inner in (settings.config.to_dict() if value is None else value).items():
        dotted = f"{where}{key}"
        if isinstance(inner, Mapping) and inner:
            yield depth, f"{key}:", ""
            yield from _written(settings, f"{dotted}.", depth + 1, inner)
        else:
            yield depth, f"{key}: {json.dumps(inner, default=str, ensure_ascii=False)}", settings.origins[dotted]


def _parts(names: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The label of each preset or file, and its settings with interpolations as they are written."""
    from omegaconf import OmegaConf

    chosen = [name for name in names if is_layer(name)]
    for index, name in enumerate(names):
        if not is_layer(name):
            label = name if Path(name).is_file() else f"preset {name}"
            yield label, OmegaConf.to_container(OmegaConf.load(preset_path(name)))
        elif name == chosen[0]:
            yield f"preset {' '.join(chosen)}", read_yaml(*layers(chosen, load_preset(*names[:index]).to_dict()))


def _origins(config: TRLConfig, parts: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    by_part = [(label, set(flat(part))) for label, part in reversed(parts)]
    return {
        key: next((label for label, keys in by_part if any(f"{key}.".startswith(f"{each}.") for each in keys)), DEFAULT)
        for key in flat(config.to_dict())
    }
