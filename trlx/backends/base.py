"""The protocol between an algorithm and the machinery that runs a model.

A trainer knows the algorithm and sees token ids, numbers about tokens, and metrics. A backend knows the model, its
optimizer, the devices and the processes. Pipeline parallelism forces the backend to own forward and backward, so the
loss function is handed down to it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from trlx.backends.distress import attempted, raise_everywhere, told
from trlx.batch import TokenBatch, TokenOutputs
from trlx.config import ModelConfig, TrainConfig
from trlx.data.collate import RowFormat
from trlx.methods.masked import Metrics
from trlx.methods.units import Unit
from trlx.models.source import check_model, exported
from trlx.sampling.base import Sampler

PATIENCE = timedelta(hours=6)
"""How long processes wait while the main one scores rollouts; torch's own ten minutes end runs with slow rewards."""

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By ``train.mixed_precision``."""

UPDATES_FILE = "updates.json"
"""In a checkpoint: optimizer steps done, on which the learning rate depends, and the loss scale of fp16."""

T = TypeVar("T")

LossFn = Callable[[TokenOutputs, TokenBatch], tuple[Tensor, Metrics]]
"""Takes one microbatch; returns the loss **summed** over its units, and its metrics."""


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """What an algorithm asks of the model beside log-probabilities."""

    value_head: bool = False
    """A value of every state (PPO, ILQL)."""
    value_layers: int = 0
    """Give the value function its own trainable copy of this many top blocks; 0 shares the policy's."""
    q_heads: int = 0
    """Number of Q heads with frozen targets (ILQL): 0, 1 or 2."""
    reference: bool = False
    """Keep the first values of the trainable weights, so that ``evaluate(batch, reference=True)`` works."""
    dropout: bool = True
    """False switches every dropout off, so that scoring and training see one and the same policy."""
    temperature: float = 1.0
    """Log-probabilities are of softmax(logits / temperature), as in sampling."""


class Backend(ABC):
    """One model with its optimizer on one or many processes."""

    options: ClassVar[tuple[str, ...]] = ()
    """Keys of ``train.trainer_kwargs`` that are read here, and not by the trainer."""

    device: torch.device
    data_rank: int
    """Index of this process among those that see different data."""
    data_size: int
    """Number of processes that see different data."""
    processes: int
    """Number of processes of the job."""
    is_main: bool
    """True on the one process that talks to the user: calls reward_fn, writes files, prints."""
    leads: bool = True
    """True on one process of each data rank: it speaks for those that hold other parts of the model with it."""
    shard: str = ""
    """Which shard of the model this process holds, as an ending of file names; "" for the one that leads."""
    microbatch_size: int
    """Rows of one forward and backward pass."""
    vocab_size: int = sys.maxsize
    """How many tokens the model knows."""
    positions: int = sys.maxsize
    """How long a row can be, at most."""
    row_format: RowFormat = RowFormat()
    """How rollouts become rows of this model."""
    lr_schedule: str = ""
    """The learning rate's schedule, where it is not the config's section alone that says it."""
    starts_at_reference: bool = True
    """Whether policy and reference are one before the first update; an adapter may make them differ from the start."""
    precision: torch.dtype = torch.float32
    """What log-probabilities are computed in, for a judgement of rounding errors."""

    @staticmethod
    def source(model: ModelConfig, train: TrainConfig) -> Any:
        """Where the model that these sections ask for comes from: a hub name, folder or archive, or a config."""
        return exported(model.model_path)

    @classmethod
    def check_source(cls, model: ModelConfig, train: TrainConfig) -> None:
        """Makes sure, before anything is loaded, that there is a model where these sections say.

        Raises:
            OSError: there is none; the message names the setting.
        """
        check_model(cls.source(model, train), "model.model_path", model.model_extra_configs)

    def check_prompts(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Makes sure that the model can read `prompts` and answer each with `new_tokens`.

        Raises:
            ValueError: it cannot; the message names the prompt.
        """
        for index, ids in enumerate(prompts):
            unknown = [token for token in ids if not 0 <= token < self.vocab_size]
            if unknown:
                raise ValueError(
                    f"Prompt {index} has the token {unknown[0]}, but the model knows {self.vocab_size} tokens: take "
                    "ids of the model's own tokenizer"
                )
            if self.row_format.width(len(ids), new_tokens) > self.positions:
                raise ValueError(
                    f"Prompt {index} has {len(ids)} tokens, which with max_new_tokens={new_tokens} are more than the "
                    f"{self.positions} positions of the model: shorten it, or lower max_new_tokens"
                )

    @abstractmethod
    def sampler(self) -> Sampler:
        """A sampler of the weights that train."""

    def weights_by_name(self) -> Iterator[tuple[str, Tensor]]:
        """The language model's weights by their Hugging Face names, whole, on the CPU; for samplers that hold a copy.

        Each comes on one process alone, while the others help to gather it: call it on every process, to its end.

        Raises:
            ValueError: an adapter trains.
        """
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, batch: TokenBatch, reference: bool = False) -> TokenOutputs:
        """What the model says about this process's rows, without gradient, in microbatches; [B, T] float32 on the CPU,
        T as in `batch`. With `reference` the frozen first policy speaks (log-probabilities only). Called on every
        process."""

    @abstractmethod
    def train_step(self, batch: TokenBatch, loss: LossFn, unit: Unit = Unit.TOKEN) -> dict[str, float]:
        """One optimizer step on this process's rows of a global batch.

        The summed loss is divided by the number of units over all microbatches and data ranks, so every split of a
        batch gives one gradient. Every process must bring the same number of rows, a multiple of those that stand
        together; so must be `microbatch_size`.
        Returns the global means of the loss function's metrics, with ``grad_norm``, ``skipped_steps`` (1.0 if gradients
        were not finite and nothing was updated), ``learning_rate_group_<i>``, ``time/forward`` and ``time/backward``.
        """

    @abstractmethod
    def update_heads(self, fn: Callable[[torch.nn.Module], None]) -> None:
        """Applies `fn` to the module that holds the heads, without gradient, on every process (ILQL target sync)."""

    @abstractmethod
    def sum_across(self, tensor: Tensor) -> Tensor:
        """The sum of a small tensor over data ranks."""

    @abstractmethod
    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is true on any process; the same answer on all."""

    @abstractmethod
    def gather_objects(self, objects: list[Any]) -> list[Any]:
        """The lists of the leading processes of all data ranks concatenated in rank order, on every process. Picklable
        objects of ours only."""

    @abstractmethod
    def broadcast_object(self, value: Any) -> Any:
        """The main process's value, on every process."""

    def on_main(self, fn: Callable[[], T]) -> T:
        """`fn()` called on the main process, its result on every process.

        Raises:
            BaseException: what `fn` raised, on every process; where it did not run, RewardError and `Interrupted` as
                they are, anything else as `ErrorElsewhere`. The others would wait for it forever.
        """
        value, error = attempted(fn) if self.is_main else (None, None)
        value, heard = self.broadcast_object((value, told(error)))
        raise_everywhere(error, heard)
        return value

    def on_each_rank(self, fn: Callable[[], list[T]]) -> list[T]:
        """`fn()` called on the leading process of every data rank, the lists concatenated in rank order.

        Raises:
            BaseException: on every process, what `fn` raised on any, as `on_main` does.
        """
        value, error = attempted(fn) if self.leads else (None, None)
        heard = [each for each in self.gather_objects([told(error)]) if each]
        raise_everywhere(error, heard[0] if heard else None)
        return self.gather_objects(value or [])

    @abstractmethod
    def barrier(self) -> None:
        """Waits until every process is here."""

    @abstractmethod
    def save(self, folder: Path, optimizer: bool = True) -> None:
        """Writes what trains and where its schedule is, with `optimizer` also the optimizer's running averages, into an
        existing folder. Called on every process."""

    @abstractmethod
    def load(self, folder: Path, optimizer: bool = True) -> None:
        """Restores what `save` wrote, bit for bit; running averages only with `optimizer` and where they were written.
        Settings of optimizer and schedule are those of this backend, and so is the reference."""

    @abstractmethod
    def export_hf(self, folder: Path) -> None:
        """Writes a folder that plain ``transformers`` loads with identical logits, and the heads beside it.

        Where an adapter trains, the folder holds the adapter alone."""

    def export_merged(self, folder: Path) -> None:
        """`export_hf` with an adapter folded into the weights it adapts.

        Raises:
            ValueError: an adapter of this kind cannot be folded in.
        """
        self.export_hf(folder)

    @abstractmethod
    def parameter_counts(self) -> tuple[int, int]:
        """How many parameters of the whole model train and how many do not, heads included. Called on every process."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short digest of the weights training started from, to recognise a resume from another model."""
