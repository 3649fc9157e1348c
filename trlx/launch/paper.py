"""A trainer without its model: it reads a run's settings and data, and checks them as it would in the run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from trlx.backends.base import Backend, ModelNeeds
from trlx.batch import Sample
from trlx.config import ModelConfig, TrainConfig
from trlx.data.hub import no_bars
from trlx.model_presets import known_shape
from trlx.models.adapters import adapted_model
from trlx.models.architecture import FROM_HUB, architecture_for
from trlx.models.decoder import output_head
from trlx.models.limits import check_positions, check_vocabulary
from trlx.sampling.base import Sampler
from trlx.sampling.settings import SamplingConfig
from trlx.trainer.base import Trainer


def on_paper(trainer: type[Trainer], data_size: int) -> type[Trainer]:
    """The class `trainer` on a backend without weights, of which `data_size` processes see data of their own."""
    real = trainer.backend_class
    kept = {"source": staticmethod(real.source), "check_source": real.check_source, "options": real.options}
    absent = dict.fromkeys(PaperBackend.__abstractmethods__, _without_weights)
    backend = type(real.__name__, (PaperBackend,), {**absent, **kept, "data_size": data_size})
    return type(trainer.__name__, (trainer,), {"backend_class": backend})


class StandIns(Sampler):
    """Answers each prompt with words of the prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def generate(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        special, end = {*self.tokenizer.all_special_ids, *sampling.eos_token_ids}, sampling.eos_token_ids[:1]
        others = [[token for token in prompt if token not in special] for prompt in dict.fromkeys(map(tuple, prompts))]
        found = []
        for index in range(len(prompts)):
            words = others[(index + 1) % len(others)]
            first = index % max(len(words), 1)
            found.append(Sample([*words[first:], *words[:first]][: sampling.max_new_tokens - 1] + end))
        return found


class PaperBackend(Backend):
    """One process, which knows the vocabulary, the positions and the rows of the model, and has no weights."""

    options: ClassVar[tuple[str, ...]] = ()
    data_rank, processes, is_main, device = 0, 1, True, torch.device("cpu")
    can_copy_weights = True

    def __init__(
        self,
        model: ModelConfig,
        optimizer: Any,
        scheduler: Any,
        train: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        needs: ModelNeeds,
    ):
        self.tokenizer, self.microbatch_size = tokenizer, train.minibatch_size or train.batch_size
        source = self.source(model, train)
        config = _config_of(source, model, train)
        if config is None:  # a NeMo archive, or a model that takes its vocabulary from the tokenizer
            self.vocab_size = len(tokenizer)
            return
        architecture = architecture_for(config, model.model_arch_type, model.model_extra_configs, needs.score_head)
        with torch.device("meta"), no_bars():
            empty = architecture.loader.from_config(copy.deepcopy(config))
        check_vocabulary(empty.get_input_embeddings().weight.shape[0], tokenizer)
        self.positions = check_positions(empty, train.seq_length) or self.positions
        self.vocab_size = output_head(empty).weight.shape[0]
        self.row_format = architecture(empty).row_format(tokenizer)

    def sampler(self, **_: Any) -> Sampler:
        return StandIns(self.tokenizer)

    def gather_objects(self, objects: list[Any]) -> list[Any]:
        return list(objects)

    def broadcast_object(self, value: Any) -> Any:
        return value

    def sum_across(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def any_process(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        pass


def _without_weights(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError("There are no weights on paper")


def _config_of(source: Any, model: ModelConfig, train: TrainConfig) -> PretrainedConfig | None:
    """The config of transformers; None: the model has none that says its vocabulary."""
    if isinstance(source, PretrainedConfig):
        return source
    path = adapted_model(source) or source
    described = train.trainer_kwargs.get("megatron_cfg") or {}
    is_described = (isinstance(described, str) or "model" in described) and source == model.model_path
    is_archive = Path(path).exists() and not (Path(path) / "config.json").is_file()
    if is_described or is_archive:
        return None
    where = {name: value for name, value in model.model_extra_configs.items() if name in FROM_HUB}
    return known_shape(path) or AutoConfig.from_pretrained(path, **where)
