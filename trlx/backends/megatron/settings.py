"""Settings of the Megatron backend, read once from the config's sections and a NeMo config file.

`read_settings` reads them; `size_checks` checks them against the model and the processes. docs/megatron-config.md
lists every key, and which of two places wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trlx import logging
from trlx.backends.base import HALVES
from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.learning_rate import Schedule, read_schedule
from trlx.backends.megatron.mapping import VOCAB_DIVISOR
from trlx.backends.megatron.nemo.decoder import read_decoder
from trlx.backends.megatron.nemo.file import WHERE, Lookup, read_megatron_cfg
from trlx.backends.megatron.nemo.keys import check_keys
from trlx.config import ModelConfig, OptimizerConfig, SchedulerConfig, TrainConfig
from trlx.models.source import exported
from trlx.strict import ConfigError, suggestion

logger = logging.get_logger(__name__)

SHORTHANDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "sequence_parallel",
)
"""Keys of ``model`` that ``train.trainer_kwargs`` may have too; there they win."""
OPTIONS = ("megatron_cfg", "pretrained_model", *SHORTHANDS)
"""Keys of ``train.trainer_kwargs``."""
PRECISIONS = {
    **dict.fromkeys(("32", "32-true"), torch.float32),
    **dict.fromkeys(("bf16", "bf16-mixed"), torch.bfloat16),
    **dict.fromkeys(("16", "16-mixed"), torch.float16),
}


@dataclass(frozen=True)
class ParallelSizes:
    """Sizes of tensor and pipeline parallelism. The data parallel size is the number of processes / (T x P)."""

    tensor: int = 1
    """Tensor parallel size T: processes that share every layer."""
    pipeline: int = 1
    """Pipeline parallel size P: stages, each with num_layers / P layers."""
    virtual: int | None = None
    """Chunks of layers per stage (interleaved schedule); None: 1."""
    sequence: bool = False
    """Sequence parallelism: tensor ranks also divide norms and dropout, by position."""


@dataclass(frozen=True)
class Recompute:
    """Which activations are computed again in the backward pass."""

    granularity: str | None = None
    """"selective" (attention only), "full", or None."""
    method: str | None = None
    """"uniform" or "block"; full only."""
    num_layers: int | None = None
    """Layers recomputed at a time (uniform), or recomputed layers of a stage (block); full only."""


@dataclass(frozen=True)
class Optim:
    """The optimizer and its learning rate."""

    name: str
    """"adam" or "sgd"."""
    lr: float
    schedule: Schedule
    distributed: bool = False
    """Shard the optimizer state over data ranks."""
    decoupled_weight_decay: bool = True
    """True: AdamW. False: Adam with weight decay added to the gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0

    @property
    def moment_names(self) -> tuple[str, ...]:
        """torch's names of the optimizer state of a weight."""
        if self.name == "adam":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum else ()


@dataclass(frozen=True)
class MegatronSettings:
    """All settings of the backend, with their types checked."""

    sizes: ParallelSizes
    recompute: Recompute
    optim: Optim
    dtype: torch.dtype
    """Type of weights and activations; bfloat16 and float16 also keep float32 main weights."""
    micro_batch_size: int
    """Rows per forward pass."""
    max_grad_norm: float | None
    """Gradients are clipped to this norm; None: no clipping."""
    seed: int
    num_layers_unfrozen: int
    decoder: DecoderConfig | None
    """The decoder in the NeMo config file, without its ``vocab_size``; None: the file describes none."""
    pretrained_model: str | None
    """Folder, ``.nemo`` archive or hub name; None: random weights."""
    hidden_dropout: float | None
    """None: the pretrained model's own value, also for `attention_dropout`."""
    attention_dropout: float | None
    make_vocab_size_divisible_by: int = VOCAB_DIVISOR
    devices: int | None = None
    """``trainer.devices``, processes per node; None: not written, or "auto"."""
    num_nodes: int | None = None


def read_settings(
    trainer_kwargs: Mapping[str, Any],
    *,
    train: TrainConfig,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    scheduler: SchedulerConfig,
) -> MegatronSettings:
    """The settings in ``train.trainer_kwargs`` and the sections of a config.

    Args:
        trainer_kwargs: ``megatron_cfg`` (see `read_megatron_cfg`), ``pretrained_model`` and `SHORTHANDS`, all optional.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, or an unsupported value.
        ValueError: the file or preset does not exist.
    """
    _check_supported(trainer_kwargs, model, train)
    config = read_megatron_cfg(trainer_kwargs.get("megatron_cfg"))
    check_keys(config)
    root = Lookup(config, WHERE)
    trainer, gpt = root.below("trainer"), root.below("model")
    decoder = read_decoder(gpt)
    return MegatronSettings(
        sizes=_sizes(gpt, trainer_kwargs),
        recompute=_recompute(gpt, train),
        optim=_optim(gpt, optimizer, scheduler, train.total_steps),
        dtype=_dtype(trainer, gpt, train),
        micro_batch_size=_micro_batch_size(gpt, train),
        max_grad_norm=_max_grad_norm(trainer, train),
        seed=train.seed,
        num_layers_unfrozen=model.num_layers_unfrozen,
        decoder=decoder,
        pretrained_model=_pretrained_model(trainer_kwargs, model, decoder),
        hidden_dropout=gpt.number("hidden_dropout", least=0, below=1),
        attention_dropout=gpt.number("attention_dropout", least=0, below=1),
        make_vocab_size_divisible_by=gpt.integer("make_vocab_size_divisible_by", VOCAB_DIVISOR),
        devices=_count(trainer, "devices"),
        num_nodes=_count(trainer, "num_nodes"),
    )


def _check_supported(trainer_kwargs: Mapping[str, Any], model: ModelConfig, train: TrainConfig) -> None:
    for key in trainer_kwargs:
        if key not in OPTIONS:
            near = suggestion(key, OPTIONS)
            raise ConfigError(f"Unknown key 'train.trainer_kwargs.{key}'.{near} Known: {', '.join(OPTIONS)}")
    advice = "the NeMo trainers cannot: write an Accelerate trainer in train.trainer"
    if model.model_arch_type != "causal":
        raise ConfigError(f"model.model_arch_type is {model.model_arch_type!r}; {advice}, or causal")
    if model.peft_config is not None:
        raise ConfigError(f"model.peft_config asks for an adapter; {advice}, or leave it out")
    if train.packing == "on":
        raise ConfigError(f"train.packing is on; {advice}, or auto")
    if train.compile:
        raise ConfigError(f"train.compile is true; {advice}, or false")
    if train.offload_optimizer:
        raise ConfigError(f"train.offload_optimizer is true; {advice}, or false")


def _sizes(gpt: Lookup, trainer_kwargs: Mapping[str, Any]) -> ParallelSizes:
    shorthand = Lookup(trainer_kwargs, "train.trainer_kwargs")
    tensor, pipeline, virtual, sequence = (shorthand if shorthand.has(key) else gpt for key in SHORTHANDS)
    size, chunks = tensor.integer(SHORTHANDS[0], 1), virtual.integer(SHORTHANDS[2], 1)
    shares_sequence = sequence.flag("sequence_parallel", False)
    if shares_sequence and size == 1:
        logger.warning("sequence_parallel is off: it needs tensor_model_parallel_size 2 or more")
    return ParallelSizes(
        tensor=size,
        pipeline=pipeline.integer(SHORTHANDS[1], 1),
        virtual=None if chunks == 1 else chunks,
        sequence=shares_sequence and size > 1,
    )


def _recompute(gpt: Lookup, train: TrainConfig) -> Recompute:
    granularity = gpt.choice("activations_checkpoint_granularity", None, ["selective", "full"])
    if granularity is None and train.gradient_checkpointing == "selective":
        return Recompute("selective")
    if granularity is None and train.gradient_checkpointing:
        return Recompute("full", "uniform", 1)
    if granularity != "full":  # NeMo files write a method with "selective" too, where it has no effect
        return Recompute(granularity)
    method = gpt.choice("activations_checkpoint_method", "uniform", ["uniform", "block"])
    return Recompute(granularity, method, gpt.integer("activations_checkpoint_num_layers", 1))


def _optim(gpt: Lookup, optimizer: OptimizerConfig, scheduler: SchedulerConfig, total_steps: int | None) -> Optim:
    section, written = Lookup(optimizer.kwargs, "optimizer.kwargs"), gpt.below("optim")
    name, in_file = optimizer.name, {key: value for key, value in written.values.items() if key != "sched"}
    if optimizer == OptimizerConfig() and written.values:
        section = Lookup(in_file, written.where)
        name = section.get("name", name)
    else:
        _warn_of_dropped("optimizer", optimizer, in_file, written.where)
    kind = _OPTIMIZERS.get(str(name).lower())
    if kind is None:
        near = suggestion(name, _OPTIMIZERS)
        raise ConfigError(f"Unknown optimizer {name!r}.{near} The NeMo trainers know: {', '.join(_OPTIMIZERS)}")
    values = kind | (_adam(section) if kind["name"] == "adam" else _sgd(section))
    values["lr"] = section.number("lr", 1e-3, least=0)
    values["weight_decay"] = section.number("weight_decay", kind["weight_decay"], least=0)
    return Optim(**values, schedule=_schedule(written.below("sched"), scheduler, total_steps, values["lr"]))


_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"name": "adam", "decoupled_weight_decay": False, "weight_decay": 0.0},
    "adamw": {"name": "adam", "weight_decay": 0.01},
    "fused_adam": {"name": "adam", "weight_decay": 0.0},
    "distributed_fused_adam": {"name": "adam", "weight_decay": 0.0, "distributed": True},
    "sgd": {"name": "sgd", "weight_decay": 0.0},
}
"""By the name in a config. Defaults are those of torch, or of NeMo for its own optimizers."""


def _adam(section: Lookup) -> dict[str, Any]:
    section.only("name", "lr", "betas", "eps", "weight_decay")
    betas = section.get("betas", Optim.betas)
    is_pair = isinstance(betas, (list, tuple)) and len(betas) == 2
    section.require(is_pair and all(_is_decay(beta) for beta in betas), "betas", "be two numbers, 0 <= number < 1")
    return {"betas": tuple(map(float, betas)), "eps": section.number("eps", Optim.eps, least=0)}


def _is_decay(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _sgd(section: Lookup) -> dict[str, Any]:
    section.only("name", "lr", "momentum", "weight_decay")
    return {"momentum": section.number("momentum", Optim.momentum, least=0, below=1)}


_SYNONYMS = {"max_steps": "T_max", "min_lr": "eta_min"}


def _warn_of_dropped(
    name: str, section: OptimizerConfig | SchedulerConfig, in_file: Mapping[str, Any], where: str
) -> None:
    """Warns if a section of the config hides different values in the NeMo config file."""

    def plain(key: str, value: Any) -> Any:
        return str(value).lower() if key == "name" else list(value) if isinstance(value, (list, tuple)) else value

    says = {
        _SYNONYMS.get(key, key): plain(key, value) for key, value in {"name": section.name, **section.kwargs}.items()
    }
    others = {
        key: value
        for key, value in in_file.items()
        if value is not None and says.get(_SYNONYMS.get(key, key)) != plain(key, value)
    }
    if others:
        said = ", ".join(f"{key} {value}" for key, value in others.items())
        logger.warning(
            f"The config's {name} section ({section.name}) wins over {where}, whose {said} have no effect: write "
            f"them in the {name} section, or write {name}: {{}} to use {where}"
        )


def _schedule(written: Lookup, scheduler: SchedulerConfig, total_steps: int | None, lr: float) -> Schedule:
    if scheduler != SchedulerConfig() or not written.values:
        _warn_of_dropped("scheduler", scheduler, written.values, written.where)
        kwargs, where = scheduler.kwargs, "scheduler.kwargs"
        return read_schedule(scheduler.name, kwargs, where=where, total_steps=total_steps, peak_lr=lr)
    kwargs = {key: value for key, value in written.values.items() if key != "name"}
    name = str(written.get("name", "CosineAnnealing"))
    return read_schedule(name, kwargs, where=written.where, total_steps=total_steps, peak_lr=lr)


def _dtype(trainer: Lookup, gpt: Lookup, train: TrainConfig) -> torch.dtype:
    if train.mixed_precision is not None:
        return HALVES.get(train.mixed_precision, torch.float32)
    section = trainer if trainer.has("precision") else gpt
    written = Lookup({"precision": str(section.get("precision", 32))}, section.where)
    return PRECISIONS[written.choice("precision", "32", PRECISIONS)]


def _micro_batch_size(gpt: Lookup, train: TrainConfig) -> int:
    written = gpt.integer("micro_batch_size", train.batch_size)
    # a preset's micro batch may be larger than this run's batch
    return train.minibatch_size or min(written, train.batch_size)


def _max_grad_norm(trainer: Lookup, train: TrainConfig) -> float | None:
    if train.max_grad_norm != TrainConfig.max_grad_norm or not trainer.has("gradient_clip_val"):
        return train.max_grad_norm
    return trainer.number("gradient_clip_val", least=0) or None


def _pretrained_model(
    trainer_kwargs: Mapping[str, Any], model: ModelConfig, decoder: DecoderConfig | None
) -> str | None:
    path = trainer_kwargs.get("pretrained_model")
    if path is None and decoder is None and isinstance(model.model_path, str):
        path = model.model_path
    return None if path is None else exported(str(path))


def _count(trainer: Lookup, key: str) -> int | None:
    """A number of processes; None for ``auto`` and -1, which leave it to the launcher."""
    value = trainer.get(key)
    return None if value in ("auto", -1, "-1") else trainer.integer(key)
