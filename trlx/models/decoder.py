"""Where a Hugging Face language model keeps its parts, found by structure, not by a table of names.

A model is a *trunk* (token ids to hidden states; its decoder, if it has an encoder too) and an *output head* (hidden
states to logits). Somewhere in the trunk
one module owns the list of transformer blocks, and beside it the norm that follows the last block.
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
        ValueError: the model has no body of its own.
    """
    if model.config.is_encoder_decoder:
        return model.get_decoder()
    if model.base_model is model:
        raise _unsupported(model, f"a body under its base_model_prefix {model.base_model_prefix!r}")
    return model.base_model


def state_givers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose first output is the last hidden state, the trunk last. Of these a model calls at least one by
    itself: OPT goes past its trunk to the module in it that owns the blocks."""
    return list(dict.fromkeys((_stack(model)[0], trunk(model))))


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks, bottom first: of all module lists in the trunk, the one that holds most weights.

    Raises:
        ValueError: the trunk has no module list.
    """
    return _stack(model)[1]


def block_lists(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The transformer blocks of the decoder and, where there is one, of the encoder."""
    encoders = [model.get_encoder()] if model.config.is_encoder_decoder else []
    return [blocks(model), *(_largest_list(model, encoder)[1] for encoder in encoders)]


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm after the last block; None where the architecture has none (OPT-350m).

    Raises:
        ValueError: more than one module could be it.
    """
    owner, _ = _stack(model)
    norms = {name: child for name, child in owner.named_children() if _is_final_norm(name, child)}
    if len(norms) > 1:
        raise _unsupported(model, f"one norm beside the blocks and found {', '.join(norms)}")
    return next(iter(norms.values()), None)


def after_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """What the trunk applies to the last block's output, in order: the final norm, and OPT's ``project_out``."""
    owner, _ = _stack(model)
    return [module for module in (final_norm(model), getattr(owner, "project_out", None)) if module is not None]


def output_head(model: PreTrainedModel) -> nn.Module:
    """The module that maps hidden states to the vocabulary.

    Raises:
        ValueError: the model has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise _unsupported(model, "output embeddings (get_output_embeddings)")
    return head


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the trunk's output. For OPT-350m that is not ``config.hidden_size``."""
    return output_head(model).weight.shape[1]


def freeze(model: PreTrainedModel, num_layers_unfrozen: int) -> None:
    """Chooses which weights of the language model train.

    -1 leaves all of them trainable, 0 none. k trains the top k blocks, the final norm, and an output head that is not
    tied; everything else is frozen, position embeddings and encoder included, so that nothing below them can drift.

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
    if num_layers_unfrozen == 0:
        return
    head, norm = output_head(model), final_norm(model)
    tied = head.weight is model.get_input_embeddings().weight
    for module in (*stack[-num_layers_unfrozen:], *([norm] if norm else []), *([] if tied else [head])):
        module.requires_grad_(True)


def disable_dropout(model: PreTrainedModel, *others: nn.Module) -> None:
    """Switches every dropout of `model` and `others` off for good.

    ``model.config`` is untouched, so an export keeps what was there.
    """
    quiet = copy.copy(model.config)
    _silence(quiet)
    for module in chain(*(root.modules() for root in (model, *others))):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _silence(module)
        # GPT-J, GPT-Neo, Falcon and Persimmon read the probability from the config at every call.
        if getattr(module, "config", None) is model.config and not isinstance(module, PreTrainedModel):
            module.config = quiet


@contextmanager
def probing(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yields a few token ids [1, T] for a check at construction: evaluation mode, no gradient, nothing random drawn.

    Every module is back in its own mode afterwards.
    """
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
    # modules() goes outside in, and max keeps the first of equals: a list nested in a block never wins.
    return max(lists, key=lambda found: sum(weight.numel() for weight in found[1].parameters()))


def _is_final_norm(name: str, module: nn.Module) -> bool:
    about_embeddings = "emb" in name or "proj" in name
    return "norm" in type(module).__name__.lower() and not about_embeddings


def _silence(holder: nn.Module | PretrainedConfig) -> None:
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and any(part in name for part in _DROPOUT_NAMES):
            setattr(holder, name, 0.0)


def _unsupported(model: PreTrainedModel, looked_for: str) -> ValueError:
    return ValueError(f"{type(model).__name__} is not supported: looked for {looked_for}.")
