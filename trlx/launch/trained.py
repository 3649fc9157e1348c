"""What was trained, or lies on the hub, ready to sample: for ``trlx generate`` and ``trlx chat``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from transformers import GenerationConfig

from trlx import checkpoint, logging
from trlx.config import TRLConfig
from trlx.data.hub import check_source
from trlx.launch.job import TINY
from trlx.launch.made import with_tiny_model
from trlx.models.policy import HEADS_FILE
from trlx.models.source import exported
from trlx.presets import load_preset
from trlx.run.folder import BEST
from trlx.sampling.settings import SamplingConfig, sweep
from trlx.tracking import CONFIG
from trlx.trainer.base import Trainer

logger = logging.get_logger(__name__)

KEPT = ("dtype", "torch_dtype", "attn_implementation", "trust_remote_code", "load_in_4bit", "load_in_8bit")
"""Keys of the run's ``model.model_extra_configs`` that also load what it exported."""
MODEL_FILES = ("config.json", "adapter_config.json", "model_config.yaml")
"""A folder with a model has one of these."""


@dataclass
class Source:
    """A model, and the run that trained it."""

    model: str
    """A folder, a ``.nemo`` archive, or a name on the hub."""
    run: dict[str, Any] = field(default_factory=dict)
    """The settings of its run; {}: they are not known."""
    step: int | None = None

    def section(self, name: str) -> dict[str, Any]:
        """A section of the run's settings; {}: they are not known."""
        return self.run.get(name) or {}


def find(place: str) -> Source:
    """The model at `place`: a run's folder (its newest checkpoint), a checkpoint, ``best_checkpoint``, ``hf_model``, a
    folder that ``save_pretrained`` wrote, a ``.nemo`` archive, or a name on the hub.

    Raises:
        ValueError: a folder holds neither a checkpoint nor a model; or the model is a reward model.
        OSError: there is no such folder or model.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        if folder.is_file() and folder.suffix != ".nemo":
            raise ValueError(f"{place} is a file: name a folder, a .nemo archive, or a model of the hub")
        if place != TINY:
            check_source(place, "the checkpoint")
        return Source(place)
    saved = checkpoint.find(folder) or checkpoint.newest(folder) or checkpoint.find(folder / BEST)
    if saved is None and folder.resolve().name == "hf_model":
        saved = checkpoint.find(folder.resolve().parent)
    if saved is not None:
        state, run = checkpoint.read_state(saved, tensors=False)
        found = Source(exported(str(saved / "hf_model")), run["config"], state["schedule"]["step"])
    else:
        found = Source(_model_in(folder), _settings_in(folder))
    if found.section("method").get("name") == "RewardConfig":
        raise ValueError(f"{place} is a reward model, which generates nothing: it scores, as --reward {found.model}")
    return found


def _model_in(folder: Path) -> str:
    inside = folder / "hf_model"
    model = exported(str(inside if inside.is_dir() else folder))
    if Path(model).is_dir() and (
        _settings_in(Path(model)) or not any((Path(model) / n).is_file() for n in MODEL_FILES)
    ):
        raise ValueError(f"{folder} holds neither a checkpoint nor a model: name a folder that a run has saved into")
    return model


def _settings_in(folder: Path) -> dict[str, Any]:
    """The settings of the run that writes into a folder; {} if none does."""
    file = folder / CONFIG  # a model's config has the same name
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings if {"method", "train"} <= settings.keys() else {}


def sampler(
    source: Source,
    settings: list[str],
    stop: list[str],
    tokenizer: str | None = None,
    layout: Mapping[str, int | None] | None = None,
    seed: int = 0,
    **usual: Any,
) -> Trainer:
    """A trainer that holds the model and its Q heads, and samples: with the settings of its run's evaluations.

    Args:
        settings: ``key=value``, over the run's; see `SamplingConfig`.
        tokenizer: folder or hub name; by default the model's.
        layout: ``tensor_model_parallel_size`` and ``pipeline_model_parallel_size``, for Megatron.
        usual: settings where the run names none.

    Raises:
        ValueError, OSError, ImportError: a setting is wrong, or the model cannot be loaded.
    """
    divided = {name: size for name, size in (layout or {}).items() if size is not None}
    on_megatron = bool(divided) or source.model.endswith(".nemo")
    heads = _q_heads(source.model)
    method = "ILQL" if heads else "SFT"
    config = load_preset(method.lower())
    config = config.evolve(
        model=_model(source, trains_nothing=on_megatron or heads > 0),
        tokenizer={"tokenizer_path": tokenizer},
        method={"gen_kwargs": _gen_kwargs(source, settings, usual)} | ({"two_qs": heads == 2} if heads else {}),
        train={
            "trainer": f"{'NeMo' if on_megatron else 'Accelerate'}{method}Trainer",
            "trainer_kwargs": divided | _logit_mask(source, heads),
            "mixed_precision": _precision(source),
            "seq_length": source.section("train").get("seq_length") or 8,
            "minibatch_size": 1,
            "cache_hidden_states": "off",
            "seed": seed,
        },
    )
    return _built(with_tiny_model(config), stop)


def _built(config: TRLConfig, stop: list[str]) -> Trainer:
    from trlx.api import trainers

    trainer = trainers.get(config.train.trainer)
    return trainer(config, stop_sequences=stop, **config.train.trainer_kwargs)


def ending_turns(sampling: SamplingConfig, source: Source) -> SamplingConfig:
    """`sampling` for a chat: the tokens that end a text by the model's own generation config end a response, too."""
    try:
        # the model was loaded, so a file of the hub is here, too
        ends = GenerationConfig.from_pretrained(source.model, local_files_only=True).eos_token_id or []
    except (OSError, ValueError):  # there is none
        ends = []
    ends = {*sampling.eos_token_ids, *([ends] if isinstance(ends, int) else ends)}
    return replace(sampling, eos_token_id=sorted(ends))


def _model(source: Source, trains_nothing: bool) -> dict[str, Any]:
    run = source.section("model")
    loading = {name: value for name, value in (run.get("model_extra_configs") or {}).items() if name in KEPT}
    for name in ("dtype", "torch_dtype"):
        if name in loading:
            loading[name] = str(loading[name]).removeprefix("torch.")
    return {
        "model_path": source.model,
        "model_arch_type": run.get("model_arch_type") or "causal",
        "model_extra_configs": loading,
        # an optimizer must have something to train, which here it never does
        "num_layers_unfrozen": 0 if trains_nothing else 1,
    }


def _q_heads(model: str) -> int:
    """How many Q heads lie beside a model."""
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    file = folder / HEADS_FILE
    if not file.is_file():
        return 0
    with safe_open(file, framework="pt") as heads:
        return len({name.split(".")[2] for name in heads.keys() if name.startswith("q.heads.")})


def _gen_kwargs(source: Source, settings: list[str], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings of evaluations, with `settings` over them; where it tries several values, the last."""
    if wrong := [word for word in settings if "=" not in word]:
        raise ValueError(f"--gen takes key=value, such as temperature=0.7, got {' '.join(wrong)}")
    typed = OmegaConf.to_container(OmegaConf.from_dotlist(settings))
    found = {**usual, **(source.section("method").get("gen_kwargs") or {}), **typed}
    name, values = sweep(found)
    if name is not None:
        logger.info(f"{name} is {values[-1]}; the run's evaluations tried {values}: --gen {name}=... takes another")
        found[name] = values[-1]
    return found


def _logit_mask(source: Source, heads: int) -> dict[str, Any]:
    mask = (source.section("train").get("trainer_kwargs") or {}).get("logit_mask") if heads else None
    if isinstance(mask, str):  # an array, whose entries no checkpoint holds
        logger.warning("The run's logit_mask was an array, which is not in its settings: sampling without it")
        mask = None
    return {} if mask is None else {"logit_mask": mask}


def _precision(source: Source) -> str | None:
    asked = source.section("train").get("mixed_precision")
    return None if asked == "fp16" and not torch.accelerator.is_available() else asked


def use_device(name: str | None) -> None:
    """Makes "cpu", "cuda" or "cuda:1" the device of this process. Called before any device is used.

    Raises:
        ValueError: there is no such device here.
    """
    kind, _, index = (name or "").partition(":")
    if not name:
        return
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"--device is {name!r}: write cpu, cuda, or cuda:N for GPU N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name!r}, but there are {torch.cuda.device_count()} GPUs here")
    os.environ["ACCELERATE_TORCH_DEVICE"] = name
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
