"""Import paths of CarperAI's trlx: a table, not files.

``from trlx.data.configs import TRLConfig`` goes on working, with one DeprecationWarning for each old path in a process.
The finder in ``trlx/__init__.py`` asks `find_spec` once Python's own search has found nothing. A few old functions
whose place nothing has taken stand at the end of this file; what is gone is answered from `trlx.compat_names`.
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trlx.compat_names import GONE

_SECTIONS = {
    name: f"trlx.config:{name}"
    for name in ("TRLConfig", "ModelConfig", "TokenizerConfig", "OptimizerConfig", "SchedulerConfig", "TrainConfig")
}
_METHODS = {name: f"trlx.method_configs:{name}" for name in ("PPOConfig", "ILQLConfig", "SFTConfig", "RFTConfig")}
_PRESETS = {f"default_{name}_config": f"trlx.presets:default_{name}_config" for name in ("ppo", "ilql", "sft", "rft")}
_NEMO_PRESETS = {
    f"default_nemo_{size}_config": f"trlx.compat:default_nemo_{size}_config" for size in ("1_3b", "2b", "20b")
}
_REGISTER_METHOD = {"register_method": "trlx.registry:register_method"}
_REGISTER_TRAINER = {"register_trainer": "trlx.registry:register_trainer"}
_LOGGING = (
    "DEBUG INFO WARNING ERROR CRITICAL get_logger set_verbosity get_verbosity enable_explicit_format reset_format "
    "enable_progress_bar disable_progress_bar is_progress_bar_enabled"
).split()

OLD_PATHS: dict[str, dict[str, str]] = {
    "trlx.trlx": {"train": "trlx.api:train"},
    "trlx.data.configs": _SECTIONS,
    "trlx.data.default_configs": {**_SECTIONS, **_METHODS, **_PRESETS, **_NEMO_PRESETS},
    "trlx.data.method_configs": {
        "MethodConfig": "trlx.method_configs:MethodConfig",
        "get_method": "trlx.method_configs:get_method",
        **_REGISTER_METHOD,
    },
    "trlx.models.modeling_ppo": {
        "PPOConfig": "trlx.method_configs:PPOConfig",
        "AdaptiveKLController": "trlx.methods.ppo:AdaptiveKL",
        "FixedKLController": "trlx.methods.ppo:FixedKL",
    },
    "trlx.models.modeling_ilql": {"ILQLConfig": "trlx.method_configs:ILQLConfig"},
    "trlx.trainer.accelerate_base_trainer": {"AccelerateRLTrainer": "trlx.trainer.base:Trainer", **_REGISTER_TRAINER},
    "trlx.trainer.accelerate_ppo_trainer": {"AcceleratePPOTrainer": "trlx.trainer.accelerate:AcceleratePPOTrainer"},
    "trlx.trainer.accelerate_ilql_trainer": {
        "AccelerateILQLTrainer": "trlx.trainer.accelerate:AccelerateILQLTrainer",
        "make_experience": "trlx.compat:make_experience",
    },
    "trlx.trainer.accelerate_sft_trainer": {
        "AccelerateSFTTrainer": "trlx.trainer.accelerate:AccelerateSFTTrainer",
        "SFTConfig": "trlx.method_configs:SFTConfig",
    },
    "trlx.trainer.accelerate_rft_trainer": {
        "AccelerateRFTTrainer": "trlx.trainer.accelerate:AccelerateRFTTrainer",
        "RFTConfig": "trlx.method_configs:RFTConfig",
    },
    "trlx.trainer.nemo_ppo_trainer": {"NeMoPPOTrainer": "trlx.trainer.nemo:NeMoPPOTrainer"},
    "trlx.trainer.nemo_ilql_trainer": {"NeMoILQLTrainer": "trlx.trainer.nemo:NeMoILQLTrainer"},
    "trlx.trainer.nemo_sft_trainer": {"NeMoSFTTrainer": "trlx.trainer.nemo:NeMoSFTTrainer"},
    "trlx.pipeline": {"register_datapipeline": "trlx.registry:register_datapipeline"},
    "trlx.pipeline.offline_pipeline": {
        "PromptPipeline": "trlx.data.prompts:PromptPipeline",
        "DialogMessage": "trlx.compat:DialogMessage",
        "DialogStore": "trlx.compat:DialogStore",
        "tokenize_dialogue": "trlx.compat:tokenize_dialogue",
    },
    "trlx.utils": {"set_seed": "trlx.compat:set_seed"},
    "trlx.utils.loading": {"get_trainer": "trlx.compat:get_trainer", "get_pipeline": "trlx.compat:get_pipeline"},
    "trlx.utils.logging": {
        **{name: f"trlx.logging:{name}" for name in _LOGGING},
        "MultiProcessAdapter": "trlx.logging:RankLogger",
        "log_levels": "trlx.logging:LEVELS",
    },
    "trlx.utils.modeling": {
        "RunningMoments": "trlx.methods.masked:RunningMoments",
        "whiten": "trlx.compat:whiten",
        "logprobs_of_labels": "trlx.compat:logprobs_of_labels",
        "flatten_dict": "trlx.compat:flatten_dict",
        "hf_get_decoder": "trlx.models.decoder:trunk",
        "hf_get_decoder_blocks": "trlx.models.decoder:blocks",
        "hf_get_decoder_final_norm": "trlx.models.decoder:final_norm",
        "hf_get_lm_head": "trlx.models.decoder:output_head",
    },
}
"""Old module -> name -> where it is now, as "module:attribute"."""


def find_spec(name: str) -> ModuleSpec | None:
    """The spec of an old module or of something gone; None for a name that CarperAI's trlx had not either."""
    if name not in OLD_PATHS and name not in GONE:
        return None
    # ``from package import name`` makes Python look for a module package.name, and so reach the sentence about name
    return importlib.util.spec_from_loader(name, _Loader(), is_package=True)


class _Loader:
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name in GONE:
            raise ImportError(GONE[spec.name], name=spec.name)
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A table has nothing to run."""


class _OldModule(ModuleType):
    """Looks a name up when it is first asked for, and warns at the first of them."""

    def __getattr__(self, name: str) -> Any:
        table, full_name = OLD_PATHS[self.__name__], f"{self.__name__}.{name}"
        if name not in table:
            raise AttributeError(GONE.get(full_name, f"module {self.__name__!r} has no attribute {name!r}"))
        if not any(known in self.__dict__ for known in table):
            warnings.warn(_advice(self.__name__, name), DeprecationWarning, stacklevel=2)
        module, _, attribute = table[name].partition(":")
        value = operator.attrgetter(attribute)(importlib.import_module(module))
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *OLD_PATHS[self.__name__]})


def _advice(old: str, name: str) -> str:
    module, _, attribute = OLD_PATHS[old][name].partition(":")
    others = sorted({place.partition(":")[0] for place in OLD_PATHS[old].values()} - {module})
    rest = f"; its other names are in {', '.join(others)}" if others else ""
    return f"{old} is an import path of CarperAI's trlx: {name} is now {module}.{attribute}{rest}"


# What nothing has taken the place of


def get_trainer(name: str) -> type:
    """The trainer registered as `name`, in any case."""
    import trlx.api  # noqa: F401  registers the trainers
    from trlx.registry import trainers

    return trainers.get(name)


def get_pipeline(name: str) -> type:
    """The pipeline registered as `name`, in any case."""
    import trlx.api  # noqa: F401  registers the pipelines
    from trlx.registry import pipelines

    return pipelines.get(name)


def set_seed(seed: int) -> None:
    """Seeds python, numpy and torch with `seed` plus the number of this process."""
    import os

    from trlx.checkpoint import seed_everything

    seed_everything(seed + int(os.environ.get("RANK") or 0))


def default_nemo_1_3b_config() -> Any:
    """Settings of the 1.3 billion parameter model, as OmegaConf."""
    return _nemo_config("megatron_1.3b")


def default_nemo_2b_config() -> Any:
    """Settings of the 2 billion parameter model, as OmegaConf."""
    return _nemo_config("megatron_2b")


def default_nemo_20b_config() -> Any:
    """Settings of the 20 billion parameter model, as OmegaConf."""
    return _nemo_config("megatron_20b")


def _nemo_config(preset: str) -> Any:
    from trlx.presets import megatron_preset

    return megatron_preset(preset)


@dataclass
class DialogMessage:
    """One turn of a dialogue: token ids, and whether the model said them."""

    is_output: bool
    tokens: tuple[int, ...]


def tokenize_dialogue(dialogue: str | Sequence[str], tokenizer: Any, max_length: int = 2048) -> list[DialogMessage]:
    """The turns of one sample, see `trlx.data.dialogue.dialogues`; turns of one speaker in a row become one.

    Raises:
        ValueError: the dialogue does not alternate prompt and output, or no token of an output is left.
    """
    from trlx.data.dialogue import dialogues

    sample = dialogue if isinstance(dialogue, str) else list(dialogue)
    (rollout,) = dialogues([sample], tokenizer, max_length)
    trained = rollout.trained or [True] * len(rollout.response)
    ids = [*rollout.prompt, *rollout.response]
    flags = iter([False] * len(rollout.prompt) + trained)
    return [DialogMessage(is_output, tuple(turn)) for is_output, turn in groupby(ids, lambda _: next(flags))]


class DialogStore:
    """Tokenized dialogues as Hugging Face training rows; labels are -100 on what is not an output."""

    def __init__(self, dialogs: Sequence[Sequence[DialogMessage]], tokenizer: Any):
        self.tokenizer = tokenizer
        self.history = [self._row(dialog) for dialog in dialogs]

    def __len__(self) -> int:
        return len(self.history)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.history[index]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.history)

    def create_loader(self, batch_size: int, shuffle: bool = False) -> DataLoader:
        """Batches of input_ids, attention_mask and labels, padded on the tokenizer's padding side."""
        return DataLoader(self, batch_size=batch_size, shuffle=shuffle, collate_fn=self._collate)

    def _row(self, dialog: Sequence[DialogMessage]) -> dict[str, Tensor]:
        ids = torch.tensor([token for turn in dialog for token in turn.tokens])
        is_output = torch.tensor([turn.is_output for turn in dialog for _ in turn.tokens])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(~is_output, -100)}

    def _collate(self, rows: list[dict[str, Tensor]]) -> Any:
        inputs = {name: [row[name] for row in rows] for name in ("input_ids", "attention_mask")}
        batch = self.tokenizer.pad(inputs, return_tensors="pt")
        labels = self.tokenizer.pad({"input_ids": [row["labels"] for row in rows]}, return_tensors="pt")["input_ids"]
        batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
        return batch


def make_experience(
    samples: Sequence[Any], rewards: Sequence[float], tokenizer: Any, max_length: int = 2048, verbose: bool = True
) -> Any:
    """ILQL's data: a `trlx.data.store.RolloutStore` with rewards normalised over all samples."""
    from trlx.data.dialogue import dialogues
    from trlx.data.store import RolloutStore
    from trlx.methods.ilql import normalize_returns

    rollouts = dialogues(samples, tokenizer, max_length, scores=[float(reward) for reward in rewards])
    for rollout, score in zip(rollouts, normalize_returns([r.score for r in rollouts]), strict=True):
        rollout.score = score
    return RolloutStore(rollouts, tokenizer.pad_token_id)


def whiten(xs: Tensor, shift_mean: bool = True, distributed: bool = False, group: Any = None) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), plus the mean again without `shift_mean`; the variance is unbiased.

    Raises:
        NotImplementedError: `distributed` or `group` ask for the numbers of other processes.
    """
    if distributed or group is not None:
        raise NotImplementedError("whiten() sees this process only; trainers whiten with trlx.methods.masked.whiten")
    variance, mean = torch.var_mean(xs)
    white = (xs - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else white + mean


def logprobs_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax of `logits` [..., V] at `labels` [...]."""
    return logits.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def flatten_dict(d: Mapping[str, Any], parent_key: str = "", sep: str = "/") -> dict[str, Any]:
    """Nested mappings as one, the keys joined by `sep`."""
    flat: dict[str, Any] = {}
    for key, value in d.items():
        path = f"{parent_key}{sep}{key}" if parent_key else key
        flat |= flatten_dict(value, path, sep) if isinstance(value, Mapping) else {path: value}
    return flat
