"""Saves and loads the weights and the optimizer state of this process's pipeline stage.

Checkpoints hold whole tensors under their Hugging Face names, so a run can resume with other parallel sizes. Each stage
writes its own layers, and gathers one weight at a time from its tensor ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trlx.backends.base import other_weights
from trlx.backends.megatron.mapping import SCORE, Entry, Replicated, Vocabulary
from trlx.backends.megatron.model import PolicyStage
from trlx.backends.megatron.parallel import ParallelState
from trlx.backends.megatron.updates import Updates
from trlx.models.reference import sum_of_bits

HEADS = "heads."


@dataclass(frozen=True)
class Weight:
    """One weight of this stage, or this tensor rank's shard of it."""

    name: str
    """Megatron-Core's name, with the layer's number in the whole model."""
    value: nn.Parameter
    entry: Entry
    is_copy: bool
    """True for the last stage's copy of a tied embedding."""


class StageWeights:
    """Reads and writes the weights of a stage. Call every method on every process.

    Args:
        entries: see ``mapping.entries``.
    """

    def __init__(self, stage: list[PolicyStage], entries: dict[str, Entry], parallel: ParallelState):
        self.entries = entries
        self.parallel = parallel
        self.weights = [weight for chunk in stage for weight in _named(chunk, entries)]

    def load(self, read: Callable[[str], Any], weights: Iterable[Weight]) -> None:
        """Loads this rank's shards of `weights`; `read` maps a Hugging Face name to a tensor."""
        with torch.no_grad():
            for weight in weights:
                weight.value.copy_(self._shard(weight, read))

    def of_model(self) -> list[Weight]:
        """Weights in the files of the model: those of the language model, or of the classifier with its score."""
        return [weight for weight in self.weights if weight.name == SCORE or not weight.name.startswith(HEADS)]

    def of_heads(self) -> list[Weight]:
        """Weights of the other heads, which the last stage has."""
        return [weight for weight in self.weights if weight.name != SCORE and weight.name.startswith(HEADS)]

    def trained(self) -> list[Weight]:
        """Weights in a checkpoint: those that train, and all heads. The others are loaded from the first model."""
        return [w for w in self.weights if w.value.requires_grad or w.name.startswith(HEADS)]

    def whole(self, weights: Iterable[Weight], value: Callable[[Weight], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor on the CPU) of `value(weight)`, a tensor of the weight's shape.

        Yields on tensor rank 0 of data rank 0; the other tensor ranks only send their shards.
        """
        for weight in weights:
            local = value(weight).detach()
            if weight.is_copy or self.parallel.data_rank:
                continue
            shards = [local] if weight.entry.split_dim is None else self.parallel.gather_over_tensor_ranks(local)
            if self.parallel.tensor_rank == 0:
                yield from weight.entry.whole([shard.cpu() for shard in shards]).items()

    @property
    def writes(self) -> bool:
        """True on the process that writes its stage's files."""
        return self.parallel.data_rank == 0 and self.parallel.tensor_rank == 0

    def save_trained(self, folder: Path, updates: Updates) -> None:
        """Writes the trained weights in float32."""
        found = self.whole(self.trained(), lambda weight: updates.main_weight(weight.value))
        self._write(folder / f"policy-{self.parallel.stage:03d}.safetensors", found)

    def load_trained(self, folder: Path, updates: Updates) -> None:
        """Loads what `save_trained` wrote, with any parallel sizes and precision.

        Raises:
            ValueError: the checkpoint holds other weights than those that train now.
        """
        read, names = _reader(folder, "policy")
        trained = self.trained()
        wanted, known = (_hf_names(weights) for weights in (trained, self.weights))
        odd = sorted((wanted - names) | (names & known - wanted))
        # raise on every stage: the others would wait for one that raised alone
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, odd[:3])
        if any(found):
            raise ValueError(other_weights(folder, {name for each in found for name in each}))
        with torch.no_grad():
            for weight in trained:
                updates.set_main_weight(weight.value, self._shard(weight, read).to(weight.value.device))

    def save_moments(self, folder: Path, updates: Updates) -> None:
        """Writes the optimizer state of every weight."""
        trained = [weight for weight in self.weights if weight.value.requires_grad]
        kinds = sorted({kind for weight in trained for kind in updates.state_names(weight.value)})
        tensors: dict[str, Tensor] = {}
        for kind in kinds:
            having = [weight for weight in trained if kind in updates.state_names(weight.value)]
            found = self.whole(having, lambda weight, kind=kind: updates.optimizer_state(weight.value, kind))
            tensors |= {f"{kind}/{name}": tensor for name, tensor in found}
        self._write(folder / f"optimizer-{self.parallel.stage:03d}.safetensors", tensors.items())

    def load_moments(self, folder: Path, updates: Updates) -> None:
        """Loads what `save_moments` wrote, with any parallel sizes."""
        read, _ = _reader(folder, "optimizer")
        updates.init_state()
        with torch.no_grad():
            for weight in (weight for weight in self.weights if weight.value.requires_grad):
                for kind in updates.state_names(weight.value):
                    shard = self._shard(weight, lambda name, kind=kind: read(f"{kind}/{name}"))
                    updates.set_optimizer_state(weight.value, kind, shard)

    def counts(self) -> tuple[int, int]:
        """Trained and frozen parameters of the whole model, without vocabulary padding."""
        mine = torch.zeros(2, dtype=torch.int64, device=self.parallel.device)
        for weight in self.weights if self.writes else ():
            size = sum(math.prod(shape) for shape in weight.entry.hf_shapes.values())
            mine[0 if weight.value.requires_grad else 1] += 0 if weight.is_copy else size
        dist.all_reduce(mine)
        return int(mine[0]), int(mine[1])

    def digest(self) -> str:
        """A short hash of the language model's weights, equal for all parallel sizes."""
        mine = {}
        for weight in self.of_model():
            counts = not weight.is_copy and (weight.entry.split_dim is not None or self.parallel.tensor_rank == 0)
            if counts and self.parallel.data_rank == 0:
                mine[weight.name] = sum_of_bits(weight.value.detach())
        found: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, mine)
        sums: dict[str, int] = {}
        for each in found:
            for name, bits in each.items():
                sums[name] = (sums.get(name, 0) + bits) % 2**64
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]

    def _shard(self, weight: Weight, read: Callable[[str], Any]) -> Tensor:
        return weight.entry.shard(read, self.parallel.tensor_rank, self.parallel.sizes.tensor)

    def _write(self, file: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        found = dict(tensors)
        if self.writes:
            save_file(found, file)


class DropoutRNG:
    """The state of this process's dropout random number generators."""

    def __init__(self, parallel: ParallelState):
        self.file = f"dropout-{parallel.data_rank:05d}-{parallel.tensor_rank:03d}-{parallel.stage:03d}.safetensors"

    def save(self, folder: Path) -> None:
        save_file(dict(tensor_parallel.get_cuda_rng_tracker().get_states()), folder / self.file)

    def load(self, folder: Path) -> None:
        """Restores the state; keeps the current one if the checkpoint has none for these ranks."""
        if (folder / self.file).is_file():
            tensor_parallel.get_cuda_rng_tracker().set_states(load_file(folder / self.file))


def _named(chunk: PolicyStage, entries: dict[str, Entry]) -> Iterator[Weight]:
    for name, value in chunk.named_parameters():
        if name.startswith(HEADS):
            yield Weight(name, value, _head_entry(name.removeprefix(HEADS), value, chunk), False)
            continue
        name = _in_whole_model(name, chunk.first_layer)
        is_copy = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
        yield Weight(name, value, entries[name], is_copy)


def _head_entry(name: str, value: Tensor, chunk: PolicyStage) -> Entry:
    if not getattr(value, "tensor_model_parallel", False):
        return Replicated(name, tuple(value.shape))
    width = value.shape[1] if value.dim() == 2 else None
    return Vocabulary(name, chunk.shard.size, width, chunk.vocab_size)


def _in_whole_model(name: str, first_layer: int) -> str:
    keys = name.split(".")
    if keys[:2] == ["decoder", "layers"]:
        keys[2] = str(int(keys[2]) + first_layer)
    return ".".join(keys)


def _hf_names(weights: Iterable[Weight]) -> set[str]:
    return {name for weight in weights for name in weight.entry.hf_names}


def _reader(folder: Path, kind: str) -> tuple[Callable[[str], Any], set[str]]:
    """(a function from a name to a slice of the tensor, all names), from the files of all stages."""
    homes = {}
    for file in sorted(folder.glob(f"{kind}-*.safetensors")):
        opened = safe_open(file, framework="pt")
        homes |= {name: opened for name in opened.keys()}
    return (lambda name: homes[name].get_slice(name)), set(homes)
