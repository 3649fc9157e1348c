"""The protocol between an algorithm and the machinery that runs a model.

A trainer knows the algorithm and sees token ids, numbers about tokens, and metrics. A backend knows the model, its
optimizer, the devices and the processes. Pipeline parallelism forces the backend to own forward and backward, so the
loss function is handed down to it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil
import torch
from torch import Tensor

from trlx.backends.distress import attempted, raise_everywhere, told
from trlx.backends.microbatches import FEWEST, at_least, filled, microbatches, row_lengths
from trlx.batch import TokenBatch, TokenOutputs
from trlx.config import ModelConfig, TrainConfig
from trlx.data.collate import RowFormat
from trlx.methods.masked import Metrics
from trlx.methods.units import Unit
from trlx.models.source import check_model, exported
from trlx.sampling.base import Sampler

PATIENCE = timedelta(hours=6)
"""How long processes wait for each other. torch's own 10 minutes would end runs with a slow reward_fn."""

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By ``train.mixed_precision``."""

UPDATES_FILE = "updates.json"
"""In a checkpoint: the number of optimizer steps, which sets the learning rate, and the loss scale of fp16."""

T = TypeVar("T")

LossFn = Callable[[TokenOutputs, TokenBatch], tuple[Tensor, Metrics]]
"""Takes one microbatch; returns the loss **summed** over its units, and its metrics."""


def other_weights(folder: Path, odd: Iterable[str]) -> str:
    """The message of an error: the checkpoint in `folder` is not of the weights that train; `odd` are those that only
    one of the two has."""
    return (
        f"{folder} holds other trained weights than this config trains, e.g. {', '.join(sorted(odd)[:3])}: set "
        "model.num_layers_unfrozen and model.peft_config as they were then, or start a new run with the path of its "
        "hf_model as model.model_path"
    )


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """What an algorithm asks of the model beside log-probabilities."""

    value_head: bool = False
    """A value of every state (PPO, ILQL)."""
    value_layers: int = 0
    """The value function gets its own trainable copy of this many top blocks; 0: it shares the policy's blocks."""
    q_heads: int = 0
    """Number of Q heads with frozen targets (ILQL): 0, 1 or 2."""
    score_head: bool = False
    """One number for a whole row instead of log-probabilities (reward models): the model is a classifier."""
    reference: bool = False
    """Keep the first values of the trainable weights, for ``evaluate(batch, reference=True)``."""
    dropout: bool = True
    """False switches all dropout off, so that sampling, evaluation and training use the same policy."""
    temperature: float = 1.0
    """Log-probabilities are of softmax(logits / temperature), as in sampling."""


class Backend(ABC):
    """One model with its optimizer on one or many processes."""

    options: ClassVar[tuple[str, ...]] = ()
    """Keys of ``train.trainer_kwargs`` that the backend reads, not the trainer."""

    device: torch.device
    data_rank: int
    """Index of this process among those that see different data."""
    data_size: int
    """Number of processes that see different data."""
    processes: int
    """Number of processes of the job."""
    is_main: bool
    """True on the one process that calls reward_fn, writes files and prints."""
    leads: bool = True
    """True on one process of each data rank. It speaks for the other processes that hold shards of the same model."""
    shard: str = ""
    """Names this process's shard of the model in file names; "" on the process that leads."""
    microbatch_size: int
    """The most rows of one forward and backward pass."""
    microbatch_tokens: int | None = None
    """The most tokens of one, padding included."""
    packs: bool = False
    """Whether the rows of one need no padding."""
    pass_cost: float = FEWEST
    """See `microbatches`. Where all processes take part in each pass, they need equally many: as few as possible."""
    vocab_size: int = sys.maxsize
    """Number of tokens that the model knows."""
    positions: int = sys.maxsize
    """Maximum length of a row."""
    row_format: RowFormat = RowFormat()
    """How rollouts become rows of this model."""
    can_leave_out: bool = True
    """Whether `before_update` may leave out an update and training goes on."""
    before_update: Callable[[dict[str, float]], bool] = staticmethod(lambda means: True)
    """Called on every process after a step's backward pass, with the means of its metrics. Returns whether to apply the
    gradients. If they are not applied, the step has no ``grad_norm``, and its ``skipped_steps`` is 1."""
    lr_schedule: str = ""
    """The learning-rate schedule, if it depends on more than the config's section ``scheduler``."""
    can_copy_weights: bool = False
    """Whether the main process can save without the others, so that `save` and `export_hf` use `background.write`."""
    starts_at_reference: bool = True
    """Whether policy and reference are equal before the first update; an adapter can make them differ."""
    precision: torch.dtype = torch.float32
    """The dtype in which log-probabilities are computed."""
    fingerprint: str
    """A short hash of the weights that training started from."""

    @staticmethod
    def source(model: ModelConfig, train: TrainConfig) -> Any:
        """Where these sections say the model is: a hub name, folder or archive, or a config."""
        return exported(model.model_path)

    @classmethod
    def check_source(cls, model: ModelConfig, train: TrainConfig) -> None:
        """Checks, before anything is loaded, that `source` is a model.

        Raises:
            OSError: it is not; the message names the setting.
        """
        check_model(cls.source(model, train), "model.model_path", model.model_extra_configs)

    def check_prompts(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Checks that the model can read `prompts` and answer each with `new_tokens`.

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
        """A sampler that uses the weights that train."""

    def weights_by_name(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor on the CPU) of the language model's weights, for samplers with a copy.

        Yields them on the main process alone, but all processes gather them: every process must iterate to the end.
        An adapter is merged into them.

        Raises:
            ValueError: an adapter trains that cannot be merged.
        """
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, batch: TokenBatch, reference: bool = False) -> TokenOutputs:
        """The outputs for this process's rows, without gradient; [B, T] float32 on the CPU, B and T as in `batch`.

        With `reference`, those of the frozen first policy (log-probabilities only). Called on every process.
        """

    @abstractmethod
    def train_step(
        self, batch: TokenBatch, loss: LossFn, unit: Unit = Unit.TOKEN, together: int = 1
    ) -> dict[str, float]:
        """One optimizer step on this process's rows of a global batch.

        Divides the summed loss by the number of units in all microbatches of all data ranks, so every split of a batch
        gives the same gradient. A microbatch has rows of about one length, and at most `microbatch_size`. All processes
        must have the same number of rows. That and `microbatch_size` must be multiples of ``unit.rows`` and `together`.

        Args:
            together: blocks of this many consecutive rows stay in one microbatch.

        Returns:
            The global means of the loss function's metrics, and ``grad_norm``, ``skipped_steps`` (1.0 if gradients were
            not finite and nothing was updated), ``learning_rate_group_<i>``, ``time/forward`` and ``time/backward``.
        """

    def forget_rows(self) -> None:
        """Drops what is kept of the rows so far, because a new collection follows."""

    @abstractmethod
    def update_heads(self, fn: Callable[[torch.nn.Module], None]) -> None:
        """Calls `fn` with the module of the heads, without gradient, on every process (ILQL target sync)."""

    def microbatches(self, batch: TokenBatch, together: int = 1) -> list[list[int]]:
        """The row numbers of each microbatch of this process's rows."""
        lengths, limits = row_lengths(batch), {"together": together, "most_tokens": self.microbatch_tokens}
        if self.packs:
            found = filled(lengths, self.microbatch_size, **limits)
        else:
            found = microbatches(lengths, self.microbatch_size, self.pass_cost, **limits)
        if self.pass_cost < FEWEST or self.microbatch_tokens is None:
            return found
        return at_least(max(self.gather_objects([len(found)])), found, together)

    @abstractmethod
    def sum_across(self, tensor: Tensor) -> Tensor:
        """The sum of a small tensor over data ranks."""

    @abstractmethod
    def max_across(self, tensor: Tensor) -> Tensor:
        """The highest of each number of a small tensor over all processes; the same on all."""

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is true on any process; the same answer on all."""
        return bool(self.max_across(torch.tensor(float(flag))))

    def memory(self) -> dict[str, float]:
        """GiB of the process that has most: what it holds of main memory now, and on CUDA devices what tensors held of
        the device at most so far. Called on every process."""
        held = {"memory/cpu": psutil.Process().memory_info().rss}
        if self.device.type == "cuda":
            held["memory/gpu"] = torch.cuda.max_memory_allocated(self.device)
        found = self.max_across(torch.tensor([size / 2**30 for size in held.values()]))
        return dict(zip(held, found.tolist(), strict=True))

    @abstractmethod
    def gather_objects(self, objects: list[Any]) -> list[Any]:
        """On every process, the lists of the leading processes of all data ranks, concatenated in rank order. They are
        pickled."""

    @abstractmethod
    def broadcast_object(self, value: Any) -> Any:
        """The main process's value, on every process."""

    def on_main(self, fn: Callable[[], T]) -> T:
        """Calls `fn` on the main process; returns its result on every process.

        Raises:
            BaseException: on every process, if `fn` raised it. The other processes raise RewardError and `Interrupted`
                as they are, and anything else as `ErrorElsewhere`.
        """
        value, error = attempted(fn) if self.is_main else (None, None)
        value, heard = self.broadcast_object((value, told(error)))
        raise_everywhere(error, heard)
        return value

    def on_each_rank(self, fn: Callable[[], list[T]]) -> list[T]:
        """Calls `fn` on the leading process of every data rank; returns their lists, concatenated in rank order.

        Raises:
            BaseException: on every process, if `fn` raised it on any; see `on_main`.
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
        """Writes the trained weights, the number of steps and, with `optimizer`, the optimizer's running averages into
        an existing folder. Called on every process."""

    @abstractmethod
    def load(self, folder: Path, optimizer: bool = True) -> None:
        """Restores exactly what `save` wrote; running averages only with `optimizer` and if they were written. Settings
        of optimizer and scheduler, and the reference, stay those of this backend."""

    @abstractmethod
    def export_hf(self, folder: Path, merge: bool = False) -> None:
        """Writes a folder that plain ``transformers`` loads with the same logits, and a file with the heads.

        If an adapter trains, the folder holds the adapter alone, or with `merge` the model with the adapter merged.

        Raises:
            ValueError: this adapter cannot be merged.
        """

    def trained(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """(name, weight, gradient) of the weights that train, as this process holds them."""
        raise NotImplementedError

    @abstractmethod
    def parameter_counts(self) -> tuple[int, int]:
        """(trainable, frozen) parameters of the whole model with its heads. Called on every process."""
