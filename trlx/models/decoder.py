"""Finds the modules of any Hugging Face language model by their structure, without a table of names.

A model is a *trunk* (token ids to hidden states; the decoder if there is an encoder) and an *output head* (hidden
states to logits). One module of the trunk owns the list of transformer blocks and the norm after the last block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_DROPOUT_NAMES = ("dropout", "layerdrop", "pdrop")


def trunk(model: PreTrainedModel) -> nn.Module:
    """The module whose first output is the last hidden state [B, T, d].

    Raises:
        ValueError: the model is its own base model.
    """
    if model.config.is_encoder_decoder:
        return model.get_decoder()
    if model.base_model is model:
        raise _unsupported(model, f"a body under its base_model_prefix {model.base_model_prefix!r}")
    return model.base_model


def state_givers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose first output is the last hidden state. A model calls at least one of them: OPT skips its trunk
    and calls the owner of the blocks."""
    return list(dict.fromkeys((_stack(model)[0], trunk(model))))


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks, bottom first: the module list with the most weights in the trunk.

    Raises:
        ValueError: the trunk has no module list.
    """
    return _stack(model)[1]


def block_lists(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The transformer blocks of the decoder, and of the encoder if there is one."""
    encoders = [model.get_encoder()] if model.config.is_encoder_decoder else []
    return [blocks(model), *(_largest_list(model, encoder)[1] for encoder in encoders)]


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm after the last block; None if the model has none (OPT-350m).

    Raises:
        ValueError: more than one module could be it.
    """
    owner, _ = _stack(model)
    norms = {name: child for name, child in owner.named_children() if _is_final_norm(name, child)}
    if len(norms) > 1:
        raise _unsupported(model, f"one norm beside the blocks and found {', '.join(norms)}")
    return next(iter(norms.values()), None)


def after_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that the trunk applies after the last block, in order: the final norm, OPT's ``project_out``."""
    owner, _ = _stack(model)
    return [module for module in (final_norm(model), getattr(owner, "project_out", None)) if module is not None]


def output_head(model: PreTrainedModel) -> nn.Module:
    """The module that maps hidden states to logits; of a classifier its linear layer ``score``.

    Raises:
        ValueError: the model has none.
    """
    head = model.get_output_embeddings() or getattr(model, "score", None)
    if head is None:
        raise _unsupported(model, "output embeddings (get_output_embeddings)")
    return head


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the trunk's output. It is not ``config.hidden_size`` for OPT-350m."""
    return output_head(model).weight.shape[1]


def freeze(model: PreTrainedModel, num_layers_unfrozen: int) -> None:
    """Chooses which weights of the language model train: -1 all, 0 none, k the top k blocks and what follows them.

    Those are the final norm, and the output head if it is not tied. All else is frozen, position embeddings and
    encoder included, so the input of the trained blocks stays the same.

    Raises:
        ValueError: `num_layers_unfrozen` is below -1 or above the number of blocks.
    """
    stack = blocks(model)
    if not -1 <= num_layers_unfrozen <= len(stack):
        raise ValueError(
            f"num_layers_unfrozen is {num_layers_unfrozen}, but {type(model).__name__} has {len(stack)} blocks: "
            f"write -1 to train everything, 0 to train the heads only, or 1 to {len(stack)}."
        )
    if num_layers_unfrozen == -1:
        return
    model.requires_grad_(False)
    head, norm = output_head(model), final_norm(model)
    if num_layers_unfrozen == 0:
        head.requires_grad_(head is getattr(model, "score", None))  # a classifier's only head
        return
    tied = head.weight is model.get_input_embeddings().weight
    for module in (*stack[-num_layers_unfrozen:], *([norm] if norm else []), *([] if tied else [head])):
        module.requires_grad_(True)


def disable_dropout(model: PreTrainedModel, *others: nn.Module) -> None:
    """Switches every dropout of `model` and `others` off. ``model.config`` stays the same, for exports."""
    quiet = copy.copy(model.config)
    _silence(quiet)
    for module in chain(*(root.modules() for root in (model, *others))):
        _silence(module)
        # GPT-J, GPT-Neo, Falcon and Persimmon read the probability from the config at every call
        if getattr(module, "config", None) is model.config and not isinstance(module, PreTrainedModel):
            module.config = quiet


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether the model computes something else in train mode."""
    return any(getattr(module, name) > 0 for module in model.modules() for name in _dropout_rates(module))


@contextmanager
def probing(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yields a few token ids [1, T] for a check at construction, in evaluation mode, without gradients and without
    random numbers. Afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    embeddings = model.get_input_embeddings().weight
    model.eval()
    try:
        with torch.no_grad():
            yield torch.arange(min(5, embeddings.shape[0]), device=embeddings.device)[None]
    finally:
        for module, mode in modes:
            module.training = mode


def _stack(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    return _largest_list(model, trunk(model))


def _largest_list(model: PreTrainedModel, root: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    lists = [
        (owner, child) for owner in root.modules() for child in owner.children() if isinstance(child, nn.ModuleList)
    ]
    if not lists:
        raise _unsupported(model, "an nn.ModuleList of blocks in its trunk")
    # modules() starts outside and max keeps the first of equals: a list inside a block never wins
    return max(lists, key=lambda found: sum(weight.numel() for weight in found[1].parameters()))


def _is_final_norm(name: str, module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and "emb" not in name and "proj" not in name


def _silence(holder: nn.Module | PretrainedConfig) -> None:
    for name in _dropout_rates(holder):
        setattr(holder, name, 0.0)


def _dropout_rates(holder: nn.Module | PretrainedConfig) -> list[str]:
    """The attributes that are probabilities of dropout."""
    named = [name for name, value in vars(holder).items() if isinstance(value, float)]
    found = [name for name in named if any(part in name for part in _DROPOUT_NAMES)]
    return [*found, "p"] if isinstance(holder, nn.Dropout) else found


def _unsupported(model: PreTrainedModel, looked_for: str) -> ValueError:
    return ValueError(f"{type(model).__name__} is not supported: looked for {looked_for}.")
