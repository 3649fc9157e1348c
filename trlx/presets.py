"""Named configurations that ship with the library, as YAML files in ``configs/``."""

from __future__ import annotations

from pathlib import Path

from trlx.config import TRLConfig
from trlx.strict import suggestion


def load_preset(name: str, *more: str, overrides: tuple[str, ...] | list[str] = ()) -> TRLConfig:
    """The preset `name`, with further presets or YAML files merged over it, then dotted overrides.

    Example: ``load_preset("ppo", overrides=["method.gamma=0.99"])``.

    Raises:
        ValueError: there is no such preset; the message lists those there are.
    """
    return TRLConfig.load_yaml(*(preset_path(part) for part in (name, *more)), overrides=overrides)


def preset_path(name: str) -> Path:
    """The YAML file of a preset; a path to an existing file stands for itself."""
    if Path(name).is_file():
        return Path(name)
    presets = {path.stem: path for path in _folder().glob("*.yaml")}
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


def _folder() -> Path:
    here = Path(__file__).parent
    # a wheel carries the presets inside the package; a checkout has them beside it
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
