"""Adapters (PEFT): a few weights beside a frozen model train, and without them the model is the reference policy."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from trlx import logging
from trlx.models.architecture import Architecture, Causal, EncoderDecoder
from trlx.models.decoder import blocks, disable_dropout, probing
from trlx.models.policy import Policy, make_heads
from trlx.models.prompted import PrefixTuned, PrefixTunedDecoder, PromptTuned, PromptTunedEncoder
from trlx.models.reference import Exchange, Reference, exchange_pointers
from trlx.optional import require

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.get_logger(__name__)

TASKS = {Causal: "CAUSAL_LM", EncoderDecoder: "SEQ_2_SEQ_LM"}
"""What PEFT calls each architecture."""
PROMPT_LEARNING = {
    "PROMPT_TUNING": {Causal: PromptTuned, EncoderDecoder: PromptTunedEncoder},
    "P_TUNING": {Causal: PromptTuned, EncoderDecoder: PromptTunedEncoder},
    "PREFIX_TUNING": {Causal: PrefixTuned, EncoderDecoder: PrefixTunedDecoder},
}
"""Adapters that are virtual tokens; all others stand inside the model's modules."""


class AdaptedPolicy(Policy):
    """A policy of which an adapter (and the heads) train; ``model`` is the model inside it, LoRA's layers included."""

    def __init__(self, adapter: PeftModel, separable: bool, **parts: Any):
        super().__init__(adapter.get_base_model(), **parts)
        self.adapter = adapter
        self.separable = separable
        """Whether the model without its adapter is the one the adapter was put on."""

    def save_model(self, folder: Path | str, merge: bool = False) -> None:
        """Writes the adapter in PEFT's format or, with `merge`, a plain model that it has been folded into.

        Raises:
            ValueError: virtual tokens cannot be folded into weights.
        """
        if not merge:
            # "auto" would look on the hub whether the vocabulary has changed; embeddings that train are saved anyway
            self.adapter.save_pretrained(folder, save_embedding_layers=False)
            return
        kind = self.adapter.active_peft_config.peft_type
        if not hasattr(self.adapter.base_model, "merge_and_unload"):
            raise ValueError(f"An adapter of the type {kind.value} cannot be merged into a model: leave out merge=True")
        # a copy, as merging and taking apart again would leave other weights to train on
        copy.deepcopy(self.adapter).merge_and_unload().save_pretrained(folder)


class AdapterOff(Reference):
    """The reference policy of an adapted one: the model without its adapter.

    Raises:
        ValueError: the adapter has changed the model's own weights, so that without it the model is another.
    """

    def __init__(self, policy: AdaptedPolicy, exchange: Exchange = exchange_pointers):
        if not policy.separable:
            raise ValueError(
                "This adapter's way of starting changes the weights of the model itself (PiSSA, OLoRA, LoftQ ...), so "
                "there is no reference policy left to compare with: leave out init_lora_weights of model.peft_config"
            )
        # some adapters train weights of the model as well (bias: all), which are exchanged
        super().__init__(policy, exchange)
        self._policy = policy
        self._other = policy.architecture.bare()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the policy's language model is the one without adapter; its heads stay as they are."""
        with super().active(), self._policy.adapter.disable_adapter():
            self._exchange_architecture()
            try:
                yield
            finally:
                self._exchange_architecture()

    def _exchange_architecture(self) -> None:
        self._policy.architecture, self._other = self._other, self._policy.architecture

    def is_first_policy(self) -> bool:
        """Whether policy and reference agree now, on a few tokens."""
        policy, found = self._policy, []
        with probing(policy.model) as tokens:
            rows = tokens, tokens, torch.ones_like(tokens)
            found.append(policy.logits(policy.architecture.states(*rows)))
            with self.active():
                found.append(policy.logits(policy.architecture.states(*rows)))
        return torch.equal(*found)


def build_adapted_policy(
    model: PreTrainedModel,
    peft_config: PeftConfig | Mapping[str, Any] | str,
    *,
    architecture: type[Causal] | type[EncoderDecoder] = Causal,
    value_head: bool = False,
    value_layers: int = 0,
    q_heads: int = 0,
    dropout: bool = True,
    temperature: float = 1.0,
) -> AdaptedPolicy:
    """Puts an adapter on `model`, gives it the heads asked for (see ``ModelNeeds``) and makes it a policy.

    Args:
        peft_config: what the new adapter is, with a ``peft_type``; or the folder of a trained one.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: settings that PEFT does not know, or that do not go together.
    """
    require("peft", extra="peft", purpose="model.peft_config")
    before = _own_logits(architecture(model))
    adapter = _loaded(model, peft_config) if isinstance(peft_config, str) else _new(model, peft_config, architecture)
    kind = adapter.active_peft_config
    if kind.is_prompt_learning and value_layers:
        raise ValueError(
            f"Blocks of the value function's own do not go together with {kind.peft_type.value}: set "
            "method.num_value_layers_unfrozen to 0"
        )
    if not dropout:
        disable_dropout(model, *getattr(adapter, "prompt_encoder", {}).values())
    # PEFT leaves biases that train (bias: all) as they are; the reference puts them back
    warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
    with adapter.disable_adapter():
        separable = torch.equal(before, _own_logits(architecture(model)))
    value, q = make_heads(model, value_head, value_layers, q_heads)
    return AdaptedPolicy(
        adapter,
        separable,
        value_head=value,
        q_heads=q,
        temperature=temperature,
        architecture=_architecture(adapter, architecture),
    )


def adapted_model(model_path: Any) -> str | None:
    """The model that the adapter in the folder `model_path` belongs to; None where that is not an adapter.

    Raises:
        ValueError: the adapter does not say what it belongs to.
    """
    file = Path(model_path) / "adapter_config.json" if isinstance(model_path, (str, Path)) else None
    if file is None or not file.is_file():
        return None
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} does not name the model that the adapter belongs to (base_model_name_or_path)")
    return base


def _own_logits(architecture: Architecture) -> torch.Tensor:
    with probing(architecture.model) as tokens:
        return architecture.whole_logits(tokens)


def _new(model: PreTrainedModel, given: PeftConfig | Mapping[str, Any], architecture: type) -> PeftModel:
    import peft

    config, task = copy.deepcopy(given), _of(architecture, TASKS)
    if isinstance(given, Mapping):
        try:
            config = peft.get_peft_config({"task_type": task, **given})
        except (KeyError, TypeError) as error:
            known = ", ".join(sorted(kind.value for kind in peft.PeftType))
            raise ValueError(
                f"model.peft_config is not one that PEFT understands ({error}). It is a dict with peft_type (one of "
                f"{known}) and the settings of that type, e.g. {{'peft_type': 'LORA', 'r': 8}}"
            ) from error
    config.task_type = config.task_type or task
    if config.task_type != task:
        raise ValueError(f"model.peft_config.task_type must be {task} for this model.model_arch_type, or be left out")
    if config.is_prompt_learning:  # PEFT looks at the encoder's, where it finds one
        config.num_layers = config.num_layers or len(blocks(model))
    with _quietly():
        return peft.get_peft_model(model, config)


def _loaded(model: PreTrainedModel, folder: str) -> PeftModel:
    import peft

    # of virtual tokens there is saved what they have become, not what made them, and that is what trains on: to PEFT
    # such an adapter is not trainable
    config = peft.PeftConfig.from_pretrained(folder)
    with _quietly():
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=not config.is_prompt_learning)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what PEFT warns of while it corrects itself, and what transformers says about PEFT's own calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _architecture(adapter: PeftModel, base: type[Causal] | type[EncoderDecoder]) -> Architecture:
    config = adapter.active_peft_config
    if not config.is_prompt_learning:
        return base(adapter.get_base_model(), adapter)
    if config.peft_type.value not in PROMPT_LEARNING:
        raise ValueError(
            f"model.peft_config.peft_type {config.peft_type.value} is not supported; of the adapters made of virtual "
            f"tokens these are: {', '.join(PROMPT_LEARNING)}"
        )
    return _of(base, PROMPT_LEARNING[config.peft_type.value])(adapter.get_base_model(), adapter)


def _of(architecture: type, table: Mapping[type, Any]) -> Any:
    """What a table has for a class, or for the one that it is a kind of."""
    return next(value for cls, value in table.items() if issubclass(architecture, cls))
