"""The configuration: one dataclass per section, read from YAML files and dotted overrides, strict at every depth."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from trlx import logging
from trlx.guard_rules import guards_of
from trlx.method_configs import MethodConfig, get_method
from trlx.registry import architectures, trackers
from trlx.strict import ConfigError, Section, build, called_here, suggestion, unknown_key, with_numbers
from trlx.tracebacks import short_errors
from trlx.yaml_files import read_yaml

logger = logging.get_logger(__name__)

OPTIMIZERS = ("adam", "adamw", "adam_8bit_bnb", "adamw_8bit_bnb", "sgd")
SCHEDULERS = ("cosine_annealing", "linear", "constant")
NEMO_OPTIMIZERS = {"fused_adam": "adamw", "distributed_fused_adam": "adamw"}
NEMO_SCHEDULERS = {"cosineannealing": "cosine_annealing", "warmupannealing": "linear", "warmuppolicy": "constant"}
"""Names that only the NeMo trainers take, and the nearest name that the other trainers take."""
TRACKERS = "wandb tensorboard mlflow trackio comet_ml aim clearml dvclive swanlab".split()


@dataclass
class ModelConfig(Section, section="model"):
    """Which model, and how much of it trains."""

    model_path: Any
    """Hub name, folder, or a ``transformers.PretrainedConfig`` for random weights."""
    model_arch_type: str = "causal"
    """"causal" (decoder), "seq2seq" (encoder-decoder; recognised from the model's config as well), or the registered
    name of an architecture of your own."""
    num_layers_unfrozen: int = -1
    """-1 trains everything, k > 0 the top k blocks, 0 only the heads. Position embeddings are frozen with the rest."""
    peft_config: Any = None
    """A peft config, or its dict with ``peft_type`` and ``task_type``."""
    model_extra_configs: dict[str, Any] | None = None
    """Further keyword arguments of ``from_pretrained``."""

    def check(self) -> None:
        is_path = isinstance(self.model_path, (str, Path))
        is_model = is_path or hasattr(self.model_path, "to_dict")
        self.require(is_model, "model_path", "be a path, hub name or PretrainedConfig")
        self.require_choice("model_arch_type", sorted({"causal", "seq2seq", *architectures.names()}))
        adapter = self.peft_config
        is_peft = adapter is None or isinstance(adapter, Mapping) or hasattr(adapter, "to_dict")
        self.require(is_peft, "peft_config", "be a dict with peft_type, or a peft config")
        self.require(self.num_layers_unfrozen >= -1, "num_layers_unfrozen", "be -1 (all), 0 (heads only) or more")
        self.model_path = str(self.model_path) if is_path else self.model_path
        self.model_extra_configs = self.model_extra_configs or {}


@dataclass
class TokenizerConfig(Section, section="tokenizer"):
    """Which tokenizer."""

    tokenizer_path: Any = None
    """Hub name, folder, or a tokenizer object; null: the model's own."""
    padding_side: str = "left"
    """Side on which ``trainer.generate`` pads the prompts that it returns."""
    truncation_side: str = "right"
    """Side on which texts that are too long are cut."""
    tokenizer_extra_configs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of ``from_pretrained``."""

    def check(self) -> None:
        self.require_choice("padding_side", ["left", "right"])
        self.require_choice("truncation_side", ["left", "right"])
        path = self.tokenizer_path
        if isinstance(path, (str, Path)):
            self.tokenizer_path = os.path.expanduser(path)
        elif path is not None and not hasattr(path, "pad_token_id"):
            raise ConfigError(
                "tokenizer.tokenizer_path must be a hub name, a folder or a tokenizer of transformers (a Tokenizer of "
                "tokenizers becomes one by PreTrainedTokenizerFast(tokenizer_object=...)), got "
                f"{repr(path)[:80]} ({type(path).__name__})"
            )


@dataclass
class OptimizerConfig(Section, section="optimizer"):
    """Which optimizer."""

    name: str = "adamw"
    """One of adam, adamw, adam_8bit_bnb, adamw_8bit_bnb, sgd; for NeMo trainers adam, adamw, sgd, fused_adam or
    distributed_fused_adam."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments, e.g. ``{lr: 3.0e-5, weight_decay: 0.01}``."""

    def check(self) -> None:
        self.name = self.name.lower()
        self.require_choice("name", [*OPTIMIZERS, *NEMO_OPTIMIZERS])
        self.kwargs = with_numbers(self.kwargs)
        rate = self.kwargs.get("lr")
        if isinstance(rate, str) or (isinstance(rate, (int, float)) and not 0 <= rate < math.inf):
            raise ConfigError(f"optimizer.kwargs.lr must be a number of at least 0, got {rate!r}")


@dataclass
class SchedulerConfig(Section, section="scheduler"):
    """Which learning-rate schedule; stepped once per optimizer step."""

    name: str = "constant"
    """One of cosine_annealing, linear, constant; for NeMo trainers also CosineAnnealing, WarmupAnnealing and
    WarmupPolicy, see docs/megatron-config.md."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments in torch, e.g. ``{T_max: 10000, eta_min: 1.0e-6}``."""

    def check(self) -> None:
        self.name = self.name.lower()
        self.require_choice("name", [*SCHEDULERS, *NEMO_SCHEDULERS])
        self.kwargs = with_numbers(self.kwargs)


@dataclass
class TrainConfig(Section, section="train"):
    """How long, how much at once, where to write."""

    total_steps: int | None
    """Most optimizer steps; null: as many as train.epochs make."""
    seq_length: int
    """Most tokens of prompt and response together."""
    epochs: int
    """Passes over the data (SFT, ILQL) or collections of rollouts (PPO)."""
    batch_size: int
    """Rows per optimizer step **and process**."""
    eval_interval: int
    """Steps between evaluations."""
    pipeline: str
    """Registered prompt pipeline."""
    trainer: str
    """Registered trainer."""
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the trainer."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints; null: one at every evaluation after the first."""
    keep_checkpoints: int | None = None
    """How many of the newest checkpoints are kept, besides ``best_checkpoint``; null: all."""
    project_name: str = "trlx"
    run_name: str | None = None
    entity_name: str | None = None
    group_name: str | None = None
    checkpoint_dir: str = "ckpts"
    """Folder of checkpoints, metrics.jsonl and samples."""
    rollout_logging_dir: str | None = None
    """Folder that gets every rollout's token ids."""
    save_best: bool = True
    """Keep the one with the highest reward/mean, else metrics/reward, else eval/accuracy, as ``best_checkpoint``."""
    save_optimizer: bool = True
    """Write optimizer state into checkpoints; without it a run cannot be resumed exactly."""
    async_save: bool | None = None
    """Copy a checkpoint to host memory, and write it while training goes on. Null: if the model is on a GPU and each
    process holds all of it. The copy is as large as the checkpoint."""
    resume_from_checkpoint: str | None = None
    """A checkpoint, or a folder whose newest is used; "auto": checkpoint_dir. Where there is none, the run is new."""
    tracker: str | list[str] | None = "wandb"
    """wandb, tensorboard, mlflow, trackio, [another](tracking.md), a list of them, or null; metrics.jsonl is always
    written. If wandb, the default, is not installed, the run goes on without it; another one must be installed."""
    logging_dir: str | None = None
    """Folder of metrics.jsonl and samples; null: checkpoint_dir."""
    tags: list[str] | None = field(default_factory=list)
    push_to_hub: str | None = None
    """A repository of the Hugging Face hub, such as me/model, that gets the best model at the end, [with a
    card](hub.md)."""
    hub_private: bool | None = None
    """Whether that repository is private, if it is new; null: as the hub's settings say."""
    sampler: Any = "auto"
    """What draws rollouts: auto (the model that trains), generate (the same, through transformers' ``generate``), the
    name of a registered sampler, or a dict: ``engine`` (that name) and arguments, e.g. ``places`` of auto.
    [vllm](sampling.md): servers."""
    rollouts_ahead: int = 0
    """1: while the model trains on a collection, vllm already samples the next one, from the weights before; 0: not."""
    seed: int = 1000
    minibatch_size: int | None = None
    """The most rows per forward and backward pass; divides batch_size. Null: the whole batch, or what fits."""
    tokens_per_microbatch: int | None = None
    """The most tokens per forward and backward pass, padding included; a longer row is a pass alone. Null: what fits in
    memory ([how](concepts.md#backends)), on Accelerate, without minibatch_size, dropout, checkpointing and sharding."""
    packing: Any = "auto"
    """Compute the rows of a pass behind one another, without padding: auto (on CPUs, where the model can), on, off.
    What on gains on a GPU is [not measured](decisions.md#rows-behind-one-another)."""
    cache_hidden_states: Any = "auto"
    """Run frozen blocks once for each row: auto (keeps at most a quarter of the free memory, after that of a GPU in
    pinned main memory), off, or most bytes on the device."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; null: off."""
    mixed_precision: str | bool | None = None
    """no, bf16 or fp16; null: as ``accelerate launch`` says."""
    gradient_checkpointing: Any = False
    """Recompute activations in the backward pass: true, or selective (all but matrix products and attention)."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile, for training and not for sampling; packing is off then."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory while a GPU (with all weights) samples or evaluates."""
    reward_on: str = "main"
    """main: reward_fn is called on the main process with the global batch; each_rank: every process scores its rows."""
    reward_timeout: float | None = None
    """Seconds after which a call of reward_fn stops the run; null: no limit."""
    eos_in_outputs: bool = False
    """Texts of rollouts that ended by eos keep it, as in CarperAI's trlx."""
    guards: dict[str, Any] = field(default_factory=dict)
    """What is done where a run goes wrong: off, warn, skip or stop by the name of a [guard](guards.md), or a dict
    with action and limit: ``{kl: stop, entropy: {action: warn, below: 0.1}}``."""
    record_steps: Any = None
    """Steps whose tensors leave digests for [trlx replay](guards.md#replay): a list, or one in so many; null: none."""

    def check(self) -> None:
        counts = ("seq_length", "epochs", "batch_size", "eval_interval", "checkpoint_interval", "keep_checkpoints")
        self.require_range(1, *counts, "minibatch_size", "tokens_per_microbatch")
        self.require_range(0, "total_steps")
        self.require_positive("max_grad_norm", "reward_timeout")
        divides = self.minibatch_size is None or self.batch_size % self.minibatch_size == 0
        self.require(divides, "minibatch_size", f"divide train.batch_size ({self.batch_size})")
        for name in ("checkpoint_dir", "logging_dir", "rollout_logging_dir", "resume_from_checkpoint"):
            setattr(self, name, getattr(self, name) and os.path.expanduser(getattr(self, name)))
        # YAML reads off and no as false, and on as true
        self.cache_hidden_states = "off" if self.cache_hidden_states is False else self.cache_hidden_states
        self.packing = ("off", "on")[self.packing] if isinstance(self.packing, bool) else self.packing
        self.mixed_precision = "no" if self.mixed_precision is False else self.mixed_precision
        self.require_choice("packing", ["auto", "on", "off"])
        self.require_choice("rollouts_ahead", [0, 1])
        # the lengths of packed rows are Python numbers, so each batch would be compiled anew
        self.require(not (self.compile and self.packing == "on"), "packing", "be auto or off with train.compile")
        is_size = type(self.cache_hidden_states) is int and self.cache_hidden_states > 0
        is_known = is_size or self.cache_hidden_states in ("auto", "off")
        self.require(is_known, "cache_hidden_states", "be auto, off or bytes")
        self.require_choice("gradient_checkpointing", [True, False, "selective"])
        self.require_choice("tracker", [*TRACKERS, *trackers.names(), "none", None])
        self.require_choice("reward_on", ["main", "each_rank"])
        self.require_choice("mixed_precision", ["no", "bf16", "fp16", None])
        guards_of(self.guards)
        asked = self.record_steps if isinstance(self.record_steps, list) else [self.record_steps]
        are_steps = all(type(step) is int and step > 0 for step in asked)
        self.require(self.record_steps is None or are_steps, "record_steps", "be a number, a list of steps, or null")
        self.tags = self.tags or []
        engine = self.sampler.get("engine", "auto") if isinstance(self.sampler, Mapping) else self.sampler
        self.require(isinstance(engine, str), "sampler", "be auto, a sampler's name, or a dict with engine, its name")


@dataclass
class TRLConfig:
    """A whole configuration. Build it from sections, or read it with `load_yaml`, `from_dict` or `trlx.load_preset`."""

    method: MethodConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    tokenizer: TokenizerConfig
    train: TrainConfig

    def __post_init__(self):
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in SECTIONS:
            raise unknown_key("", name, SECTIONS)
        kind = SECTIONS[name]
        if not (isinstance(value, kind) or (name == "method" and dataclasses.is_dataclass(value))):
            raise ConfigError(f"config.{name} must be a {kind.__name__}, got {value!r}: change its settings one by one")
        super().__setattr__(name, value)

    def check(self) -> None:
        """Checks all values, at construction and again before training, because settings may be assigned.

        Raises:
            ConfigError: a value is out of range, or two do not go together.
        """
        for section in (getattr(self, name) for name in SECTIONS):
            if isinstance(section, Section):
                section.check()
        if self.train.rollouts_ahead and not hasattr(self.method, "importance_cap"):
            raise ConfigError(f"train.rollouts_ahead is for PPO and GRPO, not for {self.method.name}: leave it out")
        if self.train.rollouts_ahead and self.method.importance_cap is None:
            raise ConfigError(
                "train.rollouts_ahead: 1 trains on samples of an older policy: set method.importance_cap, for example "
                "2.0, which corrects for that"
            )
        is_nemo = self.train.trainer.lower().startswith("nemo")
        for section, nearest in ((self.optimizer, NEMO_OPTIMIZERS), (self.scheduler, NEMO_SCHEDULERS)):
            if section.name in nearest and not is_nemo:
                raise ConfigError(
                    f"{section.section}.name '{section.name}' is for the NeMo trainers: write {nearest[section.name]}, "
                    f"or a NeMo trainer in train.trainer, which is {self.train.trainer!r}"
                )

    @classmethod
    @short_errors
    def load_yaml(cls, *files: str | Path, overrides: Sequence[str] = ()) -> TRLConfig:
        """Reads YAML files, the later ones over the earlier, then overrides such as ``"method.gamma=0.99"``.

        Raises:
            ConfigError: an unknown key, a wrong type or a value out of range; the message names the key.
        """
        _check_sections(override.partition("=")[0].split(".")[0] for override in overrides)
        return cls.from_dict(read_yaml(*files, overrides=overrides))

    @classmethod
    @short_errors
    def from_dict(cls, config: Mapping[str, Any]) -> TRLConfig:
        """A config from nested mappings; ``method.name`` chooses the method's class.

        An unknown section is ignored with a warning, unless its name resembles that of a known one.
        """
        for name in config:
            if called_here(name) or suggestion(name, SECTIONS):
                _check_sections([name])
            elif name not in SECTIONS:
                logger.warning(f"The section '{name}' of the configuration is unknown and ignored")
        if "name" not in config.get("method", {}):
            raise ConfigError("Missing: method.name (PPOConfig, ILQLConfig, SFTConfig, RFTConfig or your own)")
        classes = {**SECTIONS, "method": get_method(config["method"]["name"])}
        sections = {name: build(kind, config.get(name, {}), name) for name, kind in classes.items()}
        return cls(**sections)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts that share nothing with this config."""
        sections = {name: getattr(self, name) for name in SECTIONS}
        return {
            name: {field.name: copy.deepcopy(getattr(section, field.name)) for field in dataclasses.fields(section)}
            for name, section in sections.items()
        }

    @short_errors
    def evolve(self, **changes: Any) -> TRLConfig:
        """A copy with nested changes: ``config.evolve(method={"gamma": 0.9}, train={"seed": 1})``."""
        return self.update(self, changes)

    @classmethod
    @short_errors
    def update(cls, base: TRLConfig | Mapping[str, Any], hparams: Mapping[str, Any]) -> TRLConfig:
        """A copy of `base` with changes given as dotted keys, nested mappings or both."""
        _check_sections(key.split(".")[0] for key in hparams)
        before = base.to_dict() if isinstance(base, TRLConfig) else copy.deepcopy(dict(base))
        return cls.from_dict(merged(before, nested(hparams)))

    def __str__(self) -> str:
        return json.dumps(self.to_json(), indent=4)

    def to_json(self) -> dict[str, Any]:
        """`to_dict` with JSON's types only, for files and trackers."""
        return json.loads(json.dumps(self.to_dict(), default=_plain))


SECTIONS: dict[str, type] = get_type_hints(TRLConfig)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):  # OmegaConf's
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    if isinstance(value, (set, frozenset)):  # in a peft config; sorted, because each process iterates it differently
        return sorted(value)
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _check_sections(names: Iterable[str]) -> None:
    for name in names:
        if name not in SECTIONS:
            raise unknown_key("", name, SECTIONS)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with dotted keys, ``{"method.gamma": 0.9}``, as mappings in mappings; later entries win."""
    unfolded: dict[str, Any] = {}
    for key, value in settings.items():
        first, *rest = key.split(".")
        for part in reversed(rest):
            value = {part: value}
        unfolded = merged(unfolded, {first: value})
    return unfolded


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`settings` with mappings in mappings under dotted keys, as `nested` reads them. Empty mappings stay."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `changes`; where both have a mapping, the mappings are merged."""
    result = dict(base)
    for key, value in changes.items():
        both_nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both_nested else copy.deepcopy(value)
    return result
