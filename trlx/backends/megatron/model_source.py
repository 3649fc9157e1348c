"""Where a model comes from: its config, its first weights, and how it is exported."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from trlx import logging
from trlx.backends.base import ModelNeeds
from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.families import decoder_config_of, find_hf_config
from trlx.backends.megatron.mapping import EMBEDDING, SCORE
from trlx.backends.megatron.nemo.file import read_megatron_cfg
from trlx.backends.megatron.nemo.weights import family_of, is_companion, is_nemo, open_nemo, write_nemo
from trlx.backends.megatron.settings import MegatronSettings
from trlx.backends.megatron.stage import StageWeights
from trlx.backends.megatron.weights import (
    Folder,
    InMemory,
    ShardWriter,
    TensorSource,
    checked_reader,
    load_weights,
    open_tensors,
    write_index,
)
from trlx.config import ModelConfig, TrainConfig
from trlx.models.architecture import Causal, Scored, scores_at_eos
from trlx.models.heads import QHeads, ValueHead
from trlx.models.limits import check_length, check_vocabulary
from trlx.models.policy import HEADS_FILE, fitting_heads, load_model, make_heads

logger = logging.get_logger(__name__)

ARCHIVE = "model.nemo"
"""The exported file of a model that transformers has no architecture for."""
STAGES = ".stages"
"""Folder for the files of its stages, before they are packed into `ARCHIVE`."""


@dataclass
class ModelSource:
    """A whole decoder, before it is sharded: its config, the names of its tensors, and its first weights."""

    decoder: DecoderConfig
    config: PretrainedConfig | None
    """Written with exported weights; its ``model_type`` decides the names of tensors. None: transformers has no such
    architecture, and a `.nemo` archive is exported."""
    tensors: TensorSource | None
    """The first weights; None: random weights of Megatron-Core."""
    heads: InMemory | None = None
    """The first weights of those heads that do not start at random."""
    tokens: int = field(init=False)
    """Rows of the embedding in `tensors`; a reward model may need one more, for its pad token."""

    def __post_init__(self):
        self.tokens = self.decoder.vocab_size

    @property
    def family(self) -> str:
        """The family whose tensor names are used."""
        return family_of(self.config)

    def load(self, weights: StageWeights) -> None:
        """Loads this process's shards of the first weights.

        Raises:
            ValueError: a tensor is missing, unused or of another shape than the config says.
        """
        if self.tensors is not None:
            parallel = weights.parallel
            stored = {**weights.entries}
            stored[EMBEDDING] = dataclasses.replace(stored[EMBEDDING], tokens=self.tokens)
            if stored.get(SCORE) and "score.weight" not in self.tensors.names():
                del stored[SCORE]  # a language model has none: it stays as it was drawn
            named = [(w.name, w.value) for w in weights.of_model() if w.name != SCORE or SCORE in stored]
            load_weights(named, stored, self.tensors, parallel.tensor_rank, parallel.sizes.tensor)
        if self.heads is not None:
            fitting = [weight for weight in weights.of_heads() if weight.entry.hf_names[0] in self.heads.tensors]
            weights.load(self.heads.read, fitting)
        self.tensors = self.heads = None  # free weights that were made in memory

    def export(self, weights: StageWeights, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Writes a folder that ``transformers`` loads, and the heads in a file of their own. Call it on every process.

        Without an architecture in transformers the folder holds ``model.nemo``, with heads and tokenizer inside.
        """
        files = folder if self.config is not None else folder / STAGES
        files.mkdir(exist_ok=True)
        writer = ShardWriter(files, f"{weights.parallel.stage:03d}")
        for name, tensor in weights.whole(weights.of_model(), lambda weight: weight.value):
            writer.add({name: tensor})
        heads = dict(weights.whole(weights.of_heads(), lambda weight: weight.value))
        if heads:
            save_file(heads, folder / HEADS_FILE)
        written: list[dict] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(written, writer.close())
        if weights.parallel.is_main:
            write_index(files, written)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if self.config is not None:
                self.config.save_pretrained(folder)
            else:
                self._pack(weights, folder)

    def _pack(self, weights: StageWeights, folder: Path) -> None:
        """Packs the files of the stages into an archive and removes them."""
        read = checked_reader(open_tensors(folder / STAGES), weights.entries)
        files = {file.name: file for file in sorted(folder.iterdir()) if is_companion(file.name)}
        write_nemo(folder / ARCHIVE, self.decoder, read, self.family, files=files)
        shutil.rmtree(folder / STAGES)
        (folder / HEADS_FILE).unlink(missing_ok=True)


def find_source(
    model: ModelConfig,
    settings: MegatronSettings,
    tokenizer: PreTrainedTokenizerBase,
    train: TrainConfig,
    needs: ModelNeeds,
) -> ModelSource:
    """The model of a run: pretrained, or random from a ``transformers`` config or a NeMo config file.

    Raises:
        ValueError: the pretrained model does not match the NeMo config file, or is too small for the tokenizer or for
            ``train.seq_length``; or a reward model has no architecture in transformers.
        OSError: the model does not exist.
    """
    if settings.pretrained_model is not None:
        found = _pretrained(settings.pretrained_model, model, settings, tokenizer, train)
    elif isinstance(model.model_path, PretrainedConfig):
        found = _random(model, needs, train.seed)
        _check_same(found.decoder, settings.decoder)
    else:
        decoder = dataclasses.replace(settings.decoder, vocab_size=len(tokenizer))
        found = ModelSource(decoder, find_hf_config(decoder), None)
    found.decoder = _with_dropout(found.decoder, settings)
    if found.heads is not None:
        taken = fitting_heads(found.heads.tensors, _head_shapes(found.decoder, needs), found.heads.where)
        found.heads = InMemory(taken, found.heads.where)
    if needs.score_head:
        _make_classifier(found, tokenizer)
    found.config = _for_export(found.config, settings.dtype, needs.score_head)
    check_vocabulary(found.decoder.vocab_size, tokenizer)
    _check_length(found.decoder, train.seq_length)
    return found


def _pretrained(
    path: str, model: ModelConfig, settings: MegatronSettings, tokenizer: PreTrainedTokenizerBase, train: TrainConfig
) -> ModelSource:
    if is_nemo(path):
        changes = read_megatron_cfg(train.trainer_kwargs.get("megatron_cfg")).get("model")
        found = open_nemo(path, len(tokenizer), changes)
        return ModelSource(found.decoder, found.config, found.tensors, found.heads)
    revision = (model.model_extra_configs or {}).get("revision")
    tensors = open_tensors(path, revision)
    where = tensors.folder if isinstance(tensors, Folder) else path
    config = AutoConfig.from_pretrained(where)
    heads = Path(where) / HEADS_FILE
    decoder = decoder_config_of(config)
    _check_same(decoder, settings.decoder)
    return ModelSource(decoder, config, tensors, InMemory(load_file(heads), str(heads)) if heads.is_file() else None)


def _random(model: ModelConfig, needs: ModelNeeds, seed: int) -> ModelSource:
    """The random weights that the Accelerate backend makes from this config and seed, on every process."""
    decoder = decoder_config_of(model.model_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = load_model(model.model_path, model.model_extra_configs, Scored if needs.score_head else Causal)
        value, q = make_heads(made, needs.value_head, 0, needs.q_heads)
    tensors = {
        f"{name}.{key}": tensor
        for name, head in (("value", value), ("q", q))
        if head is not None
        for key, tensor in head.state_dict().items()
    }
    return ModelSource(decoder, made.config, open_tensors(made), InMemory(tensors, "new heads"))


def _head_shapes(decoder: DecoderConfig, needs: ModelNeeds) -> dict[str, torch.Size]:
    """Shapes of a method's whole heads. Every stage computes them, so that all stages decide alike."""
    with torch.device("meta"):
        heads = {"value": ValueHead(decoder.hidden_size)} if needs.value_head else {}
        if needs.q_heads:
            heads["q"] = QHeads(decoder.hidden_size, decoder.vocab_size, needs.q_heads)
    return {
        f"{kind}.{name}": weight.shape for kind, head in heads.items() for name, weight in head.state_dict().items()
    }


def _make_classifier(found: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    if found.config is None:
        raise ValueError("A reward model needs an architecture of transformers, and this model fits none")
    tokens = scores_at_eos(found.config, tokenizer, found.decoder.vocab_size)
    found.config.num_labels, found.config.vocab_size = 1, tokens
    found.decoder = dataclasses.replace(found.decoder, vocab_size=tokens)


_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


def _check_same(found: DecoderConfig, wanted: DecoderConfig | None) -> None:
    if wanted is None:
        return
    differing = [name for name in _SIZES if getattr(found, name) != getattr(wanted, name)]
    if differing:
        said = ", ".join(f"{name} {getattr(wanted, name)} (it has {getattr(found, name)})" for name in differing)
        raise ValueError(f"The pretrained model differs from megatron_cfg.model in {said}: leave these keys out")


def _with_dropout(decoder: DecoderConfig, settings: MegatronSettings) -> DecoderConfig:
    wanted: Mapping[str, float | None] = {
        "hidden_dropout": settings.hidden_dropout,
        "attention_dropout": settings.attention_dropout,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    if "hidden_dropout" in given:
        given["embedding_dropout"] = None
    return dataclasses.replace(decoder, **given)


def _for_export(config: PretrainedConfig | None, dtype: torch.dtype, scored: bool) -> PretrainedConfig | None:
    if config is None:
        logger.warning(f"transformers has no architecture for this model: hf_model/ will hold {ARCHIVE} instead")
        return None
    config = type(config).from_dict(config.to_dict())
    names = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if scored else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    config.architectures = [names[config.model_type]]
    config.dtype = dtype
    return config


def _check_length(decoder: DecoderConfig, seq_length: int) -> None:
    window = decoder.attention_window
    if window is not None and seq_length > window:
        raise ValueError(
            f"train.seq_length is {seq_length}, but the model attends to {window} tokens: write at most {window}"
        )
    check_length(seq_length, decoder.max_position_embeddings, decoder.position == "learned")
