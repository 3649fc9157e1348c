"""Configurations for tests of what the Megatron backend reads."""

from pathlib import Path
from typing import Any

from trlx.backends.megatron.settings import MegatronSettings, read_settings
from trlx.config import TRLConfig
from trlx.presets import load_preset

ROOT = Path(__file__).parents[2]
SMALL = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 32}
"""The sizes of a model in NeMo's words."""


def settings_of(config: TRLConfig) -> MegatronSettings:
    """What the backend reads in `config`."""
    sections = {name: getattr(config, name) for name in ("train", "model", "optimizer", "scheduler")}
    return read_settings(config.train.trainer_kwargs, **sections)


def bare(**changes: Any) -> TRLConfig:
    """A PPO config whose optimizer and scheduler sections say nothing; 8 rows a step, 100 steps."""
    config = load_preset("ppo").to_dict()
    train = config["train"] | {"trainer": "NeMoPPOTrainer", "batch_size": 8, "total_steps": 100}
    return TRLConfig.from_dict(config | {"optimizer": {}, "scheduler": {}, "train": train}).evolve(**changes)


def read(
    megatron_cfg: Any = None, train: dict | None = None, trainer_kwargs: dict | None = None, **sections: Any
) -> MegatronSettings:
    """The settings of `bare` with a megatron_cfg."""
    written = {} if megatron_cfg is None else {"megatron_cfg": megatron_cfg}
    kwargs = {"trainer_kwargs": {**written, **(trainer_kwargs or {})}}
    return settings_of(bare(train={**(train or {}), **kwargs}, **sections))


def model(**keys: Any) -> dict:
    """A megatron_cfg that says something of the model only."""
    return {"model": keys}


def nested(key: str, value: Any) -> Any:
    """`value` under a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
