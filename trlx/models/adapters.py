"""Adapters (PEFT): a few weights beside a frozen model train. The model without them is the reference policy."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trlx import logging
from trlx.models.architecture import Architecture, Causal, EncoderDecoder, Scored
from trlx.models.decoder import blocks, disable_dropout, probing
from trlx.models.policy import Policy, make_heads
from trlx.models.prompted import PrefixTuned, PrefixTunedDecoder, PromptTuned, PromptTunedEncoder
from trlx.models.reference import Exchange, Reference, exchange_pointers
from trlx.optional import require

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.get_logger(__name__)

TASKS = {Scored: "SEQ_CLS", Causal: "CAUSAL_LM", EncoderDecoder: "SEQ_2_SEQ_LM"}
"""PEFT's name of each architecture."""
PROMPT_LEARNING = {
    "PROMPT_TUNING": {Causal: PromptTuned, EncoderDecoder: PromptTunedEncoder},
    "P_TUNING": {Causal: PromptTuned, EncoderDecoder: PromptTunedEncoder},
    "PREFIX_TUNING": {Causal: PrefixTuned, EncoderDecoder: PrefixTunedDecoder},
}
"""Adapters made of virtual tokens; all others are inside the model's modules."""


class AdaptedPolicy(Policy):
    """A policy whose adapter and heads train. ``model`` is the model inside the adapter, with LoRA's layers."""

    def __init__(self, adapter: PeftModel, separable: bool, *parts: Any):
        super().__init__(adapter.get_base_model(), *parts)
        self.adapter = adapter
        self.separable = separable
        """Whether switching the adapter off gives the logits of the original model."""

    def save_model(self, folder: Path | str, merge: bool = False) -> None:
        """Writes the adapter in PEFT's format or, with `merge`, a plain model with the adapter merged into its weights.

        Raises:
            ValueError: virtual tokens cannot be merged into weights.
        """
        if not merge:
            # "auto" would ask the hub for the size of the embeddings; embeddings that train are saved anyway
            self.adapter.save_pretrained(folder, save_embedding_layers=False)
            return
        kind = self.adapter.active_peft_config.peft_type
        if not hasattr(self.adapter.base_model, "merge_and_unload"):
            raise ValueError(f"An adapter of the type {kind.value} cannot be merged into a model: leave out merge=True")
        # merge a copy: merging and unmerging would round the weights that train
        copy.deepcopy(self.adapter).merge_and_unload().save_pretrained(folder)

    def plain_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the plain model, weight), with the adapter merged into a copy of each layer.

        Raises:
            ValueError: virtual tokens cannot be merged into weights.
        """
        if self.adapter.active_peft_config.is_prompt_learning:
            kind = self.adapter.active_peft_config.peft_type.value
            raise ValueError(
                f"An adapter of the type {kind} cannot be merged into a model, so a sampler with a copy of "
                "the weights cannot follow it: leave out train.sampler"
            )
        yield from _merged(self.model, "", {})


class AdapterOff(Reference):
    """The reference of an adapted policy: the model without its adapter.

    Raises:
        ValueError: the adapter has changed the model's own weights.
    """

    def __init__(self, policy: AdaptedPolicy, exchange: Exchange = exchange_pointers):
        if not policy.separable:
            raise ValueError(
                "model.peft_config.init_lora_weights (PiSSA, OLoRA, LoftQ ...) changes the weights of the model, "
                "so there is no reference policy left to compare with: leave it out"
            )
        # some adapters also train weights of the model (bias: all): `Reference` exchanges these
        super().__init__(policy, exchange)
        self._policy = policy
        self._bare = policy.architecture.bare()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the policy's language model runs without its adapter; the heads stay."""
        own = self._policy.architecture
        with super().active(), self._policy.adapter.disable_adapter():
            self._policy.architecture = self._bare
            try:
                yield
            finally:
                self._policy.architecture = own

    def is_first_policy(self) -> bool:
        """Whether policy and reference have equal logits for a few tokens."""
        with probing(self._policy.model) as tokens:
            policy = self._logits(tokens)
            with self.active():
                return torch.equal(policy, self._logits(tokens))

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._policy.logits(self._policy.architecture.states(tokens, tokens, torch.ones_like(tokens)))


def build_adapted_policy(
    model: PreTrainedModel,
    peft_config: PeftConfig | Mapping[str, Any] | str,
    *,
    architecture: type[Architecture] = Causal,
    value_head: bool = False,
    value_layers: int = 0,
    q_heads: int = 0,
    dropout: bool = True,
    temperature: float = 1.0,
) -> AdaptedPolicy:
    """A policy of `model` with an adapter and new heads. Other arguments as in ``ModelNeeds``.

    Args:
        peft_config: the settings of a new adapter, with a ``peft_type``; or the folder of a trained one.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: PEFT does not know a setting, or the adapter does not support it.
    """
    require("peft", extra="peft", purpose="model.peft_config")
    before = _own_logits(architecture(model))
    adapter = (
        _loaded(model, peft_config) if isinstance(peft_config, str) else make_adapter(model, peft_config, architecture)
    )
    kind = adapter.active_peft_config
    if kind.is_prompt_learning and value_layers:
        raise ValueError(
            f"model.peft_config.peft_type {kind.peft_type.value} does not support a value branch: set "
            "method.num_value_layers_unfrozen to 0"
        )
    if kind.is_prompt_learning and issubclass(architecture, Scored):
        raise ValueError(
            "model.peft_config: a reward model cannot have virtual tokens; take another peft_type, e.g. LORA"
        )
    if not dropout:
        disable_dropout(model, *getattr(adapter, "prompt_encoder", {}).values())
    # PEFT warns that it does not restore trained biases (bias: all); `Reference` does
    warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
    with adapter.disable_adapter():
        separable = torch.equal(before, _own_logits(architecture(model)))
    heads = make_heads(model, value_head, value_layers, q_heads)
    return AdaptedPolicy(adapter, separable, *heads, temperature, _architecture(adapter, architecture))


def adapted_model(model_path: Any) -> str | None:
    """The model that the adapter in the folder `model_path` belongs to; None if the folder holds no adapter.

    Raises:
        ValueError: the adapter does not name its model.
    """
    file = Path(model_path) / "adapter_config.json" if isinstance(model_path, (str, Path)) else None
    if file is None or not file.is_file():
        return None
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} does not name the model that the adapter belongs to (base_model_name_or_path)")
    return base


def _merged(module: nn.Module, prefix: str, seen: dict[int, bool]) -> Iterator[tuple[str, torch.Tensor]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    merged = None
    if isinstance(module, BaseTunerLayer):
        # a copy: merging and unmerging would round the weights that train
        copied = copy.deepcopy(module)
        copied.merge()
        module, merged = module.get_base_layer(), copied.get_base_layer()
    elif isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapter]
    for name, weight in module.named_parameters(recurse=False):
        if seen.get(id(weight)) or (id(weight) in seen and merged is not None):
            raise ValueError(
                f"{prefix}{name} has an adapter and shares its weight with another layer, so a sampler with a copy of "
                "the weights cannot follow it: leave the layer out of model.peft_config, or leave out train.sampler"
            )
        if id(weight) not in seen:  # tied weights go once
            seen[id(weight)] = merged is not None
            yield prefix + name, (weight if merged is None else merged.get_parameter(name)).detach()
    for name, child in module.named_children():
        yield from _merged(child, f"{prefix}{name}.", seen)


def _own_logits(architecture: Architecture) -> torch.Tensor:
    with probing(architecture.model) as tokens:
        return architecture.whole_logits(tokens)


def make_adapter(model: PreTrainedModel, given: PeftConfig | Mapping[str, Any], architecture: type) -> PeftModel:
    """A new adapter around `model`. Raises ValueError, see `build_adapted_policy`."""
    import peft

    config, task = copy.deepcopy(given), _entry(TASKS, architecture)
    if isinstance(given, Mapping):
        try:
            config = peft.get_peft_config({"task_type": task, **given})
        except (KeyError, TypeError) as error:
            known = ", ".join(sorted(kind.value for kind in peft.PeftType))
            raise ValueError(
                f"PEFT does not understand model.peft_config ({error}). It is a dict with peft_type (one of {known}) "
                "and the settings of that type, e.g. {'peft_type': 'LORA', 'r': 8}"
            ) from error
    config.task_type = config.task_type or task
    if config.task_type != task:
        raise ValueError(f"model.peft_config.task_type must be {task} for this model.model_arch_type, or be left out")
    if config.is_prompt_learning:  # PEFT would count the blocks of an encoder
        config.num_layers = config.num_layers or len(blocks(model))
    with _quietly():
        return peft.get_peft_model(model, config)


def _loaded(model: PreTrainedModel, folder: str) -> PeftModel:
    import peft

    # PEFT saves virtual tokens without the layers that computed them, and refuses to train such an adapter; the saved
    # embeddings train on here
    config = peft.PeftConfig.from_pretrained(folder)
    with _quietly():
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=not config.is_prompt_learning)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings about what PEFT corrects by itself and about PEFT's own calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _architecture(adapter: PeftModel, base: type[Architecture]) -> Architecture:
    config = adapter.active_peft_config
    if config.is_prompt_learning:
        if config.peft_type.value not in PROMPT_LEARNING:
            raise ValueError(
                f"model.peft_config.peft_type {config.peft_type.value} is not supported; of the adapters with virtual "
                f"tokens these are: {', '.join(PROMPT_LEARNING)}"
            )
        base = _entry(PROMPT_LEARNING[config.peft_type.value], base)
    return base(adapter.get_base_model(), adapter)


def _entry(table: Mapping[type, Any], architecture: type) -> Any:
    """The table's entry for an architecture or for its base class."""
    return next(value for cls, value in table.items() if issubclass(architecture, cls))
