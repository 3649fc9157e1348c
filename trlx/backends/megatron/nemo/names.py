"""What NeMo 1.x calls the weights of its GPT models, in the layout of Megatron-Core and in the one before.

Both keep the engine's matrices as they are, part by part, with three exceptions in the older layout: the two halves of
a gated feed-forward block may be apart, ``megatron_legacy`` has the queries of all heads of a rank before their keys
and values, and the last pipeline stage calls its copy of a tied embedding ``word_embeddings``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = re.compile(r"^model\.(module\.)?")
"""What stands before every name; ``module`` where half-precision weights were wrapped (``megatron_amp_O2``)."""
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
UP = ".up."
"""In place of the last dot: the half of a gated block that is multiplied with the activated one."""

OLDER = (
    (re.compile(r"^language_model\.encoder\."), "decoder."),
    (re.compile(r"^language_model\."), ""),
    (re.compile(r"^word_embeddings\."), "output_layer."),
    (re.compile(r"(?<=\.)self_attention\.query_key_value\."), "self_attention.linear_qkv."),
    (re.compile(r"(?<=\.)self_attention\.dense\."), "self_attention.linear_proj."),
    (re.compile(r"(?<=\.)post_attention_layernorm\."), "pre_mlp_layernorm."),
    (re.compile(r"(?<=\.)mlp\.dense_h_to_4h\."), "mlp.linear_fc1."),
    (re.compile(r"(?<=\.)mlp\.dense_h_to_4h_2\."), f"mlp.linear_fc1{UP}"),
    (re.compile(r"(?<=\.)mlp\.dense_4h_to_h\."), "mlp.linear_fc2."),
)
"""Names of the older layout and the engine's."""

JOINED = (
    (re.compile(r"(?<=\.)self_attention\.linear_qkv\.layer_norm_"), "input_layernorm."),
    (re.compile(r"(?<=\.)mlp\.linear_fc1\.layer_norm_"), "pre_mlp_layernorm."),
)
"""Norms that Transformer Engine keeps in the module behind them."""

CONSTANTS = ("inv_freq", "position_ids")
"""Ends of names under which archives keep what is computed today."""


class Shard:
    """What one tensor rank of one pipeline stage holds, by the engine's names, layers counted from the stage's first.

    Args:
        groups: head groups of this part; None: they are ordered as in the engine (see ``megatron_legacy`` above).
    """

    def __init__(self, weights: Mapping[str, Tensor], groups: int | None = None):
        self.theirs = {_engine_name(name): name for name in weights if not name.endswith(CONSTANTS)}
        """Every name in the engine's form, and the one that the archive has."""
        self._weights, self._groups = weights, groups

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len({found[1] for name in self.theirs if (found := LAYER.match(name))})

    def needs(self, name: str) -> list[str]:
        """The names, in the engine's form, of what a weight is made of; none where it is not there."""
        return [each for each in (name, _up(name)) if each in self.theirs] if name in self.theirs else []

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """A weight as the engine has it on this tensor rank; on the device "meta" its shape alone, unread."""
        found = [self._weights[self.theirs[each]].to(device) for each in self.needs(name)]
        whole = torch.cat(found) if len(found) > 1 else found[0]
        if self._groups is None or "linear_qkv" not in name:
            return whole
        return whole.unflatten(0, (3, self._groups, -1)).transpose(0, 1).flatten(0, 2)


def nemo_name(name: str) -> str:
    """What NeMo calls a weight of the engine when it computes with Transformer Engine, as it mostly does."""
    name = re.sub(r"(?<=\.)input_layernorm\.", "self_attention.linear_qkv.layer_norm_", name)
    return "model." + re.sub(r"(?<=\.)pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_", name)


def in_stage(name: str, first: int) -> str:
    """A name with layers counted over the whole model, counted from the stage's first."""
    return LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) - first}.", name)


def layer_of(name: str) -> int | None:
    """The layer a weight belongs to; None: it stands before or behind the layers."""
    found = LAYER.match(name)
    return int(found[1]) if found else None


def _engine_name(name: str) -> str:
    name = PREFIX.sub("", name)
    for pattern, ours in (*OLDER, *JOINED):
        name = pattern.sub(ours, name)
    return name


def _up(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    return f"{stem}{UP}{kind}"
