"""Presets of models: ``load_preset("grpo", "qwen3-8b", "lora", "8gpu")`` is a method's preset with layers over it:

- a model of ``configs/layers/models.yaml``,
- ``lora``: an adapter trains instead of all weights,
- ``megatron``: Megatron-Core trains the model instead of Accelerate,
- ``vllm``: vLLM servers draw the samples of PPO and GRPO,
- ``8gpu``: how a step's rows and the model are divided over 8 GPUs of 80 GB.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlx.strict import ConfigError, suggestion

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FOLDERS = [parent / "configs" for parent in Path(__file__).parents[:2]]
FOLDER = next(filter(Path.is_dir, FOLDERS), FOLDERS[-1])
"""The presets: inside the package where it is installed, beside it in a checkout."""
ADAPTER_RATE = 10
"""An adapter's learning rate is this times that of all weights."""
LENGTH = 2048
NO_MEGATRON = ("rft",)
"""Methods that have no NeMo trainer."""
VLLM = ("ppo", "grpo")
"""Methods that correct for the difference between a server and the policy."""
MICROBATCH = 2
"""Rows of a forward pass: the fewest that hold a pair."""
SMALL = 1e9
"""Larger models compute their activations again, on Accelerate."""


@dataclass(frozen=True)
class Layout:
    """How a model is divided over GPUs."""

    gpus: int
    accelerate: str | None = None
    """The file in configs/accelerate that the run starts with; None: Megatron trains the model."""
    tensor: int = 1
    pipeline: int = 1

    @property
    def data(self) -> int:
        """Data ranks: each gets rows of its own."""
        return self.gpus // (self.tensor * self.pipeline)

    @property
    def nodes(self) -> int:
        """Machines of up to 8 GPUs."""
        return -(-self.gpus // 8)

    @property
    def launch(self) -> str:
        """The command that starts a script, without the script."""
        if self.accelerate is None:
            where = " --rdzv-backend c10d --rdzv-endpoint $HOST:29500" if self.nodes > 1 else ""
            return f"torchrun --nnodes {self.nodes} --nproc-per-node {self.gpus // self.nodes}{where}"
        file = FOLDER / "accelerate" / f"{self.accelerate}.yaml"
        started = f"accelerate launch --config_file {file} --num_processes {self.gpus}"
        where = "--machine_rank $NODE --main_process_ip $HOST --main_process_port 29500"
        return f"{started} --num_machines {self.nodes} {where}" if self.nodes > 1 else started


@cache
def tables() -> dict[str, Any]:
    """What configs/layers/models.yaml says."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(FOLDER / "layers" / "models.yaml"))


def layer_names() -> list[str]:
    """The names of all layers."""
    return [*tables()["models"], "lora", "megatron", "vllm", *(f"{gpus}gpu" for gpus in tables()["rows"])]


def is_layer(name: Any) -> bool:
    """Whether a part of a preset is a layer's name, also of a number of GPUs that no model has a layout for."""
    is_known = isinstance(name, str) and (name in layer_names() or re.fullmatch(r"\d+gpu", name) is not None)
    return is_known and not Path(name).is_file()


def layers(names: list[str], base: Mapping[str, Any]) -> list[Path | dict[str, Any]]:
    """What the layers `names` set: YAML files and settings, the later over the earlier.

    Args:
        names: some of `layer_names`, in any order.
        base: the sections of the config that the layers go over.

    Raises:
        ConfigError: `names` has no model or several, or the model or the method has no such layout.
    """
    model, found = tables()["models"][model_of(names)], layout(names)
    method = base["method"]["name"].lower().removesuffix("config")
    if "megatron" in names and method in NO_MEGATRON:
        raise ConfigError(f"The Megatron backend has no trainer for {method.upper()}: leave out megatron")
    if "vllm" in names and method not in VLLM:
        raise ConfigError(
            f"The layer vllm is for PPO and GRPO, not for {method.upper()}: leave it out; RFT takes the setting "
            "train.sampler.engine=vllm"
        )
    files = [FOLDER / "layers" / f"{name}.yaml" for name in ("lora", "megatron", "vllm") if name in names]
    settings = [_settings(model, base, adapted="lora" in names)]
    return [*files, *settings, *([] if found is None else [_division(found, model, base["method"])])]


def model_of(names: list[str]) -> str:
    """The model among the layers `names`.

    Raises:
        ConfigError: there is none, or there are several.
    """
    found = [name for name in names if name in tables()["models"]]
    if len(found) == 1:
        return found[0]
    known = ", ".join(tables()["models"])
    if found:
        raise ConfigError(f"{' and '.join(found)} are several models: write one of them")
    raise ConfigError(f'{names[0]} needs a model, e.g. load_preset("grpo", "qwen3-4b", "{names[0]}"). Known: {known}')


def layout(names: list[str]) -> Layout | None:
    """The layout that the layers `names` ask for; None: they name no number of GPUs.

    Raises:
        ConfigError: the model has no such layout; the message says which it has.
    """
    if {"lora", "megatron"} <= set(names):
        raise ConfigError("The Megatron backend trains no adapters: leave out lora, or megatron")
    model, sizes = model_of(names), [int(name.removesuffix("gpu")) for name in names if name.endswith("gpu")]
    if len(sizes) > 1:
        raise ConfigError(f"{_scales(sizes)} are several numbers of GPUs: write one of them")
    kind, known = next((name for name in ("lora", "megatron") if name in names), "full"), layouts(model)
    if kind == "megatron" and kind not in known:
        raise ConfigError(f"The Megatron backend does not support {model}: leave out megatron")
    if not sizes:
        return None
    if sizes[0] not in known.get(kind, {}):
        has = "; ".join(f"{_plus(model, kind)} {_scales(known[kind])}" for kind in known)
        raise ConfigError(f"{_plus(model, kind)} has no layout for {sizes[0]} GPUs of 80 GB. There are: {has}")
    return known[kind][sizes[0]]


def layouts(model: str) -> dict[str, dict[int, Layout]]:
    """All layouts of a model: by "full", "lora" or "megatron", then by number of GPUs."""
    written, found = tables()["models"][model], {}
    for kind in ("full", "lora"):
        found[kind] = {gpus: Layout(gpus, accelerate=file) for gpus, file in written.get(kind, {}).items()}
    sizes = {gpus: map(int, division.split(" x ")) for gpus, division in written.get("megatron", {}).items()}
    found["megatron"] = {gpus: Layout(gpus, None, *each) for gpus, each in sizes.items()}
    return {kind: each for kind, each in found.items() if each}


def shape_of(model: str) -> PretrainedConfig:
    """The configuration of a model in the table, by its name there or on the hub: its sizes, and no other facts.

    As ``model.model_path`` it makes a model with random weights, without a network.

    Raises:
        ConfigError: the table has no such model.
    """
    from transformers import AutoConfig

    table = tables()["models"] | {entry["hub"]: entry for entry in tables()["models"].values()}
    if model not in table:
        raise ConfigError(f"Unknown model {model!r}.{suggestion(model, table)} Known: {', '.join(tables()['models'])}")
    return AutoConfig.for_model(**table[model]["shape"])


def known_shape(path: Any) -> PretrainedConfig | None:
    """`shape_of` for a ``model.model_path`` that is the hub name of a model in the table, and no folder."""
    hubs = {entry["hub"] for entry in tables()["models"].values()}
    return shape_of(path) if isinstance(path, str) and path in hubs and not Path(path).exists() else None


def _settings(model: Mapping[str, Any], base: Mapping[str, Any], adapted: bool) -> dict[str, Any]:
    length, method = model.get("length", LENGTH), base["method"]
    rate = tables()["rates"].get(method["name"])
    settings: dict[str, Any] = {
        "model": {"model_path": model["hub"], "num_layers_unfrozen": -1},
        "train": {"seq_length": length, "mixed_precision": "bf16"},
        "method": {"name": method["name"]},  # for interpolations of the layers' files
    }
    if "gen_kwargs" in method:
        settings["method"] |= {"gen_kwargs": {**method["gen_kwargs"], "max_new_tokens": length // 2}}
    if rate is not None:
        rate = float(f"{rate * ADAPTER_RATE:g}") if adapted else rate  # 1e-05, not 9.999999999999999e-06
        settings["optimizer"] = {"kwargs": {"lr": rate, "weight_decay": 0.0}}
    if adapted and "exclude_modules" in model:
        settings["model"]["peft_config"] = {"exclude_modules": model["exclude_modules"]}
    if rate is not None and "eta_min" in base["scheduler"]["kwargs"]:
        settings["scheduler"] = {"kwargs": {"eta_min": "${optimizer.kwargs.lr}"}}  # was that of another model
    return settings


def _division(layout: Layout, model: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Any]:
    rows = tables()["rows"][layout.gpus]
    batch = rows // layout.data
    train: dict[str, Any] = {"batch_size": batch, "minibatch_size": MICROBATCH}
    if layout.accelerate is None:
        train["trainer_kwargs"] = {
            "megatron_cfg": {"trainer": {"devices": layout.gpus // layout.nodes, "num_nodes": layout.nodes}},
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
            "sequence_parallel": layout.tensor > 1,
        }
    else:
        train["gradient_checkpointing"] = model["parameters"] > SMALL
    collection = {"num_rollouts": rows, "chunk_size": min(batch, model.get("chunk", batch))}
    return {"train": train, "method": {name: size for name, size in collection.items() if name in method}}


def _plus(model: str, kind: str) -> str:
    return model if kind == "full" else f"{model} {kind}"


def _scales(sizes: Iterable[int]) -> str:
    return ", ".join(f"{gpus}gpu" for gpus in sizes)
