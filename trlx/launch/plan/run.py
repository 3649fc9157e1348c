"""What the plan knows of a run: the model's shape, its division over processes, and the size of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trlx.backends.base import ModelNeeds
from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.mapping import VOCAB_DIVISOR, padded_vocab
from trlx.backends.megatron.settings import OPTIONS, MegatronSettings, ParallelSizes, Recompute, read_settings
from trlx.backends.megatron.size_checks import check_sizes
from trlx.config import TRLConfig
from trlx.launch.settings import settings_of
from trlx.method_configs import MethodConfig
from trlx.model_presets import known_shape
from trlx.presets import has_method, load_preset
from trlx.strict import ConfigError
from trlx.trainer import nemo

GPT2_VOCABULARY = 50257
"""Tokens of a model that a NeMo-shaped file describes, unless the caller gives a number: no tokenizer is loaded."""
METHODS = ("PPO", "GRPO", "ILQL", "SFT", "DPO", "KTO", "Reward")
TRAINERS = {f"{method}Config": getattr(nemo, f"NeMo{method}Trainer") for method in METHODS}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What memory and traffic depend on. All rows have `length` tokens; the last `response` of them are scored."""

    shape: DecoderConfig
    parallel: ParallelSizes
    data: int = 1
    """Data-parallel ranks. Each holds a copy of the model and gets its own rows."""
    rows: int
    """Rows of a microbatch."""
    microbatches: int
    """Microbatches of an optimizer step on each data rank."""
    length: int
    response: int
    element: int = 2
    """Bytes of a weight and of an activation: 4, or 2 for bf16 and fp16, which add float32 main weights."""
    recompute: Recompute = Recompute()
    distributed: bool = False
    """The distributed optimizer: main weights and moments are divided over the data ranks."""
    moments: int = 2
    """Running averages that the optimizer keeps for each weight."""
    needs: ModelNeeds = ModelNeeds()
    """Heads, reference and dropout, as the trainer asks for them."""
    unfrozen: int = -1
    """``model.num_layers_unfrozen``."""
    divisor: int = VOCAB_DIVISOR
    """``make_vocab_size_divisible_by``."""

    @property
    def gpus(self) -> int:
        return self.parallel.tensor * self.parallel.pipeline * self.data

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.rows * self.length

    @property
    def scored(self) -> int:
        """Tokens of a microbatch that get a log-probability."""
        return self.rows * self.response

    @property
    def dropout(self) -> bool:
        return self.needs.dropout and self.shape.hidden_dropout > 0

    @property
    def output_layer(self) -> bool:
        """Whether the last stage has one: a reward model has a score instead."""
        return not self.needs.score_head

    @property
    def vocab_part(self) -> int:
        """Rows of the vocabulary on each tensor rank, padding included."""
        tensor = self.parallel.tensor
        return padded_vocab(self.shape.vocab_size, self.divisor * tensor) // tensor

    @property
    def sequence_split(self) -> int:
        """The number of ranks that share norms and dropout: t with sequence parallelism (arXiv:2205.05198, 4.2.2)."""
        return self.parallel.tensor if self.parallel.sequence else 1

    @property
    def stages(self) -> range:
        return range(self.parallel.pipeline)

    def is_last(self, stage: int) -> bool:
        return stage == self.parallel.pipeline - 1

    def layers(self, stage: int) -> list[int]:
        """Numbers of the layers of a stage. An interleaved stage has several chunks (arXiv:2104.04473, 2.2.2)."""
        pipeline, chunks = self.parallel.pipeline, self.parallel.virtual or 1
        size = self.shape.num_layers // (pipeline * chunks)
        firsts = [(chunk * pipeline + stage) * size for chunk in range(chunks)]
        return [first + i for first in firsts for i in range(size)]

    def trained_layers(self, stage: int) -> list[int]:
        """For each chunk of a stage, how many of its layers train. The layers that train are the top ones."""
        layers, chunks = self.layers(stage), self.parallel.virtual or 1
        size = len(layers) // chunks
        return [sum(map(self.is_trained, layers[size * chunk : size * (chunk + 1)])) for chunk in range(chunks)]

    def is_trained(self, layer: int) -> bool:
        return self.unfrozen == -1 or layer >= self.shape.num_layers - self.unfrozen


def read_config(words: Sequence[str], method: str = "ppo", nemo: bool = True, model: str | None = None) -> TRLConfig:
    """The settings that ``trlx train`` makes of `words`: presets, YAML files and ``section.key=value``.

    One of the words may be a folder with a Hugging Face model. For a model of the presets no network is needed.

    Args:
        method: preset of the method, where the words begin with a model, a folder or a division over GPUs.
        nemo: a folder that comes first is for the NeMo trainer of `method`.
        model: replaces ``model.model_path``.

    Raises:
        ValueError: see `settings_of`.
    """
    names = [word for word in words if "=" not in word]
    folder = next((name for name in names if Path(name).is_dir()), None)
    rest, usual = [word for word in words if word != folder], {}
    if folder is not None:
        usual["model.model_path"] = folder
    if names and (names[0] == folder or not has_method(names[0])):
        rest.insert(0, method)
        if names[0] == folder and nemo:
            usual["train.trainer"] = load_preset(method).train.trainer.replace("Accelerate", "NeMo")
    config = settings_of(rest, {} if model is None else {"model.model_path": model}, usual, method).config
    known = known_shape(config.model.model_path)
    return config if known is None else config.evolve(model={"model_path": known})


def read_run(config: TRLConfig, gpus: int | None = None, vocabulary: int = GPT2_VOCABULARY) -> Run:
    """The run that a NeMo trainer would make of `config`.

    Args:
        gpus: GPUs in all. None: ``trainer.devices`` x ``trainer.num_nodes``, or as many as one copy of the model takes.

    Raises:
        ValueError: there is no NeMo trainer for the method.
        ConfigError: the layout does not divide the model, the rows or the GPUs; the message says what to write.
        OSError: the pretrained model's folder has no configuration.
    """
    train, needs = config.train, trainer_needs(config.method)
    asked = {key: value for key, value in train.trainer_kwargs.items() if key in OPTIONS}
    settings = read_settings(
        asked,
        # without an end of training some schedules have no end either, which does not matter here
        train=dataclasses.replace(train, total_steps=train.total_steps or 1),
        model=config.model,
        optimizer=config.optimizer,
        scheduler=config.scheduler,
    )
    shape = _shape(settings, config, vocabulary)
    parallel = settings.sizes
    copy = parallel.tensor * parallel.pipeline
    gpus = gpus or (settings.devices or 1) * (settings.num_nodes or 1)
    gpus = max(gpus, copy)
    check_sizes(dataclasses.replace(settings, devices=None, num_nodes=None), shape, gpus, train.batch_size)
    return Run(
        shape=shape,
        parallel=parallel,
        data=gpus // copy,
        rows=settings.micro_batch_size,
        microbatches=train.batch_size // settings.micro_batch_size,
        length=train.seq_length,
        response=_response(config),
        element=settings.dtype.itemsize,
        recompute=settings.recompute,
        distributed=settings.optim.distributed,
        moments=len(settings.optim.moment_names),
        needs=needs,
        unfrozen=settings.num_layers_unfrozen,
        divisor=settings.make_vocab_size_divisible_by,
    )


def trainer_needs(method: MethodConfig) -> ModelNeeds:
    """What the NeMo trainer of a method asks of the model.

    Raises:
        ValueError: there is no NeMo trainer for the method.
    """
    if method.name not in TRAINERS:
        known = ", ".join(name.removesuffix("Config") for name in TRAINERS)
        raise ValueError(f"There is no NeMo trainer for {method.name.removesuffix('Config')}: write one of {known}")
    return TRAINERS[method.name].needs(method)


def _shape(settings: MegatronSettings, config: TRLConfig, vocabulary: int) -> DecoderConfig:
    if settings.decoder is not None and settings.pretrained_model is None:
        return dataclasses.replace(settings.decoder, vocab_size=vocabulary)
    from transformers import AutoConfig, PretrainedConfig

    from trlx.backends.megatron.families import decoder_config_of

    path = settings.pretrained_model
    found = config.model.model_path if path is None else AutoConfig.from_pretrained(path)
    if not isinstance(found, PretrainedConfig):
        raise ConfigError(f"model.model_path {found!r} is not a model of transformers: write a folder or a preset")
    return decoder_config_of(found)


def _response(config: TRLConfig) -> int:
    """The longest response: all tokens but the first, or as many as are generated; of a reward model the eos."""
    trainer, most = TRAINERS[config.method.name], config.train.seq_length - 1
    if not trainer.online:
        return most if trainer.generates else 1
    return min(most, int(config.method.gen_kwargs.get("max_new_tokens", most)))
