"""The names of NeMo 1.x's GPT weights, in archives with Megatron-Core's names and in older ones.

Both hold Megatron-Core's matrices, sharded in the same way. Older archives differ in three ways: gate and up
projections may be two matrices; ``megatron_legacy`` stores all queries of a rank, then all keys, then all values; and
the last pipeline stage calls its copy of a tied embedding ``word_embeddings``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = re.compile(r"^model\.(module\.)?")
"""Prefix of every name; with ``module`` if half-precision weights were wrapped (``megatron_amp_O2``)."""
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
UP = ".up."
"""Replaces the last dot in the name of an up projection that is a matrix of its own."""

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
"""Older names -> Megatron-Core's."""

JOINED = (
    (re.compile(r"(?<=\.)self_attention\.linear_qkv\.layer_norm_"), "input_layernorm."),
    (re.compile(r"(?<=\.)mlp\.linear_fc1\.layer_norm_"), "pre_mlp_layernorm."),
)
"""Names of the norms that Transformer Engine keeps in the next module -> Megatron-Core's."""

CONSTANTS = ("inv_freq", "position_ids")
"""Endings of the names of constants in archives."""


class Shard:
    """The weights of one tensor rank and pipeline stage, by Megatron-Core's names. Layers count from the stage's first.

    Args:
        groups: head groups of this shard with ``megatron_legacy``; None without.
    """

    def __init__(self, weights: Mapping[str, Tensor], groups: int | None = None):
        self.theirs = {_megatron_name(name): name for name in weights if not name.endswith(CONSTANTS)}
        """Megatron-Core's name -> the archive's name."""
        self._weights, self._groups = weights, groups

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len({found[1] for name in self.theirs if (found := LAYER.match(name))})

    def needs(self, name: str) -> list[str]:
        """The names in `theirs` that a weight is made of; empty if it is missing."""
        return [each for each in (name, _up(name)) if each in self.theirs] if name in self.theirs else []

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """This rank's shard of a weight. On the device "meta" no values are read."""
        found = [self._weights[self.theirs[each]].to(device) for each in self.needs(name)]
        whole = torch.cat(found) if len(found) > 1 else found[0]
        if self._groups is None or "linear_qkv" not in name:
            return whole
        return whole.unflatten(0, (3, self._groups, -1)).transpose(0, 1).flatten(0, 2)


def nemo_name(name: str) -> str:
    """NeMo's name of a weight, for models with Transformer Engine (NeMo's default)."""
    name = re.sub(r"(?<=\.)input_layernorm\.", "self_attention.linear_qkv.layer_norm_", name)
    return "model." + re.sub(r"(?<=\.)pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_", name)


def in_stage(name: str, first: int) -> str:
    """From a layer's number in the whole model to its number in the stage, whose first layer is `first`."""
    return LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) - first}.", name)


def layer_of(name: str) -> int | None:
    """The number of a weight's layer; None for embeddings, the final norm and the output layer."""
    found = LAYER.match(name)
    return int(found[1]) if found else None


def _megatron_name(name: str) -> str:
    name = PREFIX.sub("", name)
    for pattern, ours in (*OLDER, *JOINED):
        name = pattern.sub(ours, name)
    return name


def _up(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    return f"{stem}{UP}{kind}"
