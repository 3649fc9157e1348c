"""The Megatron backend: a decoder sharded over tensor ranks and pipeline stages, with one copy per data rank."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trlx.backends.base import UPDATES_FILE, Backend, LossFn, ModelNeeds
from trlx.backends.megatron.frozen import frozen_layers
from trlx.backends.megatron.generation import PipelineSampler
from trlx.backends.megatron.mapping import entries, padded_vocab
from trlx.backends.megatron.model import PolicyStage, build_chunks, freeze, language_model
from trlx.backends.megatron.model_source import find_source
from trlx.backends.megatron.nemo.weights import is_nemo
from trlx.backends.megatron.parallel import initialize, join
from trlx.backends.megatron.schedule import Reading, run_forward, run_forward_backward
from trlx.backends.megatron.settings import OPTIONS, read_settings
from trlx.backends.megatron.size_checks import check_sizes
from trlx.backends.megatron.stage import DropoutRNG, StageWeights
from trlx.backends.megatron.updates import Updates
from trlx.backends.microbatches import microbatches, row_lengths
from trlx.batch import TokenBatch, TokenOutputs
from trlx.config import ModelConfig, OptimizerConfig, SchedulerConfig, TrainConfig
from trlx.methods.masked import finish, merge_packed, pack
from trlx.methods.units import Unit
from trlx.models.frozen import row_keys
from trlx.models.reference import Reference
from trlx.models.source import check_model, exported
from trlx.sampling.base import Sampler


class MegatronBackend(Backend):
    """A decoder on Megatron-Core, with the parallel sizes in ``train.trainer_kwargs``."""

    options = OPTIONS

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        scheduler: SchedulerConfig,
        train: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        needs: ModelNeeds,
    ):
        _refuse(needs)
        asked = {key: value for key, value in train.trainer_kwargs.items() if key in OPTIONS}
        settings = read_settings(asked, train=train, model=model, optimizer=optimizer, scheduler=scheduler)
        self.model_source = find_source(model, settings, tokenizer, train, needs)
        decoder, self.vocab_size = self.model_source.decoder, self.model_source.decoder.vocab_size
        if decoder.position == "learned":
            self.positions = decoder.max_position_embeddings
        join()
        check_sizes(settings, decoder, dist.get_world_size(), train.batch_size)
        self.parallel = initialize(settings.sizes, train.seed)
        self.device, self.is_main, self.leads = self.parallel.device, self.parallel.is_main, self.parallel.leads
        self.shard = "" if self.leads else f"-{self.parallel.tensor_rank:03d}-{self.parallel.stage:03d}"
        self.data_rank, self.data_size = self.parallel.data_rank, self.parallel.data_size
        self.processes = dist.get_world_size()
        self.tokenizer, self.needs, self.precision = tokenizer, needs, settings.dtype
        self.microbatch_size = settings.micro_batch_size
        self.microbatch_tokens = train.tokens_per_microbatch
        self.lr_schedule = repr(settings.optim.schedule)  # may contain train.total_steps
        self.divisor = settings.sizes.tensor if settings.sizes.sequence else 1
        self.multiple = settings.sizes.pipeline if settings.sizes.virtual else 1

        rows = padded_vocab(self.vocab_size, settings.make_vocab_size_divisible_by * settings.sizes.tensor)
        self.stage = build_chunks(decoder, settings, rows, needs, train.seed, self.device)
        self.weights = StageWeights(
            self.stage, entries(decoder, self.model_source.family, rows, needs.score_head), self.parallel
        )
        self.model_source.load(self.weights)
        self.fingerprint = self.weights.digest()
        freeze(self.stage, model.num_layers_unfrozen)
        self.reference = Reference(_language_models(self.stage)) if needs.reference else None
        self.wrapped = [_wrapped(chunk, settings.optim.distributed) for chunk in self.stage]
        self.updates = Updates(self.wrapped, settings, self.parallel)
        self.randomness = DropoutRNG(self.parallel)
        rates = (decoder.hidden_dropout, decoder.attention_dropout, decoder.embedding_dropout)
        has_dropout = needs.dropout and any(rates)
        self.trunk = frozen_layers(
            self.stage, self.parallel, train.cache_hidden_states, model.num_layers_unfrozen, has_dropout
        )

    @staticmethod
    def source(model: ModelConfig, train: TrainConfig) -> Any:
        return exported(train.trainer_kwargs.get("pretrained_model") or model.model_path)

    @classmethod
    def check_source(cls, model: ModelConfig, train: TrainConfig) -> None:
        path, named = cls.source(model, train), train.trainer_kwargs.get("pretrained_model")
        # if megatron_cfg describes the model, model.model_path only names the tokenizer
        is_described = named is None and "megatron_cfg" in train.trainer_kwargs
        is_unpacked = isinstance(path, str) and Path(path).is_dir() and is_nemo(path)
        if not (is_described or is_unpacked):
            where = "train.trainer_kwargs.pretrained_model" if named else "model.model_path"
            check_model(path, where, model.model_extra_configs)

    def sampler(self) -> Sampler:
        return PipelineSampler(self.stage, self.parallel, bool(self.needs.q_heads), self.vocab_size)

    def weights_by_name(self) -> Iterator[tuple[str, Tensor]]:
        return self.parallel.to_first_stage(self.weights.whole(self.weights.of_model(), lambda weight: weight.value))

    def evaluate(self, batch: TokenBatch, reference: bool = False) -> TokenOutputs:
        if reference and self.reference is None:
            raise ValueError("This method was built without a reference policy")
        self._train_mode(False)
        rows = self.microbatches(batch)
        with self.reference.active() if reference else nullcontext():
            found = run_forward(self.stage, self._microbatches(batch, rows), self._reading(batch, rows))
        if self.needs.score_head:
            last = torch.zeros(len(batch), device=self.device)
            for each, outputs in zip(rows, found, strict=False):
                last[each] = outputs.last
            return TokenOutputs(torch.zeros(batch.tokens.shape), last=self.parallel.from_last_stage(last).cpu())
        logprobs = self._collected([outputs.logprobs for outputs in found], rows, batch)
        if reference or not self.needs.value_head:
            return TokenOutputs(logprobs)
        return TokenOutputs(logprobs, self._collected([outputs.values for outputs in found], rows, batch))

    def train_step(
        self, batch: TokenBatch, loss: LossFn, unit: Unit = Unit.TOKEN, together: int = 1
    ) -> dict[str, float]:
        self._train_mode(True)
        # the loss is a sum; DistributedDataParallel averages gradients over data ranks, so multiply by their number
        loss_factor = self.data_size / max(float(self.sum_across(unit.count(batch))), 1.0)

        def on_outputs(outputs: TokenOutputs, microbatch: TokenBatch) -> tuple[Tensor, Any]:
            summed, metrics = loss(outputs, microbatch)
            return summed * loss_factor, pack(metrics)

        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.updates.clear()
        began = time.perf_counter()
        rows = self.microbatches(batch, max(unit.rows, together))
        pieces, reading = self._microbatches(batch, rows), self._reading(batch, rows)
        found, forward = run_forward_backward(self.wrapped, pieces, on_outputs, reading)
        backward = time.perf_counter() - began - forward
        means = self._means(found)
        updated = self.updates.apply(leave_out=not self.before_update(means))
        return means | updated | {"time/forward": forward, "time/backward": backward}

    def forget_rows(self) -> None:
        if self.trunk is not None:
            self.trunk.forget()

    @torch.no_grad()
    def update_heads(self, fn: Callable[[nn.Module], None]) -> None:
        for chunk in self.stage:
            if chunk.heads is not None:
                fn(chunk.heads)

    def sum_across(self, tensor: Tensor) -> Tensor:
        return self.parallel.sum_over_data(tensor)

    def max_across(self, tensor: Tensor) -> Tensor:
        found = tensor.to(self.device, copy=True)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.cpu()

    def gather_objects(self, objects: list[Any]) -> list[Any]:
        found: list[Any] = [None] * self.data_size
        dist.all_gather_object(found, objects, group=parallel_state.get_data_parallel_group())
        # tensor ranks and stages of a data rank may hold different objects: take the first process's
        return self.parallel.from_leader([each for of_rank in found for each in of_rank])

    def broadcast_object(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        dist.barrier()

    def save(self, folder: Path, optimizer: bool = True) -> None:
        self.parallel.require_groups()
        self.weights.save_trained(folder, self.updates)
        self.randomness.save(folder)
        if optimizer:
            self.weights.save_moments(folder, self.updates)
        if self.is_main:
            (folder / UPDATES_FILE).write_text(json.dumps(self.updates.state()))

    def load(self, folder: Path, optimizer: bool = True) -> None:
        self.weights.load_trained(folder, self.updates)
        self.randomness.load(folder)
        averages = optimizer and any(folder.glob("optimizer-*"))
        self.updates.load(json.loads((folder / UPDATES_FILE).read_text()), averages)
        if averages:
            self.weights.load_moments(folder, self.updates)

    def export_hf(self, folder: Path, merge: bool = False) -> None:  # there is no adapter to merge
        self.parallel.require_groups()
        self.model_source.export(self.weights, folder, self.tokenizer)

    def trained(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        for number, chunk in enumerate(self.stage):
            for name, weight in chunk.named_parameters():
                if weight.requires_grad:
                    yield f"{number}.{name}", weight, getattr(weight, "main_grad", weight.grad)

    def parameter_counts(self) -> tuple[int, int]:
        return self.weights.counts()

    def _microbatches(self, batch: TokenBatch, rows: list[list[int]]) -> list[TokenBatch]:
        """Microbatches on the device, padded to a width that sequence parallelism can divide.

        An interleaved schedule needs a multiple of the stages, so microbatches with an empty response mask are added.
        """
        pieces = [_widened(batch.rows(each), self.divisor) for each in rows]
        missing = -len(pieces) % self.multiple
        if missing:
            pieces += [pieces[-1].replace(response_mask=torch.zeros_like(pieces[-1].response_mask))] * missing
        return [piece.to(self.device) for piece in pieces]

    def _reading(self, batch: TokenBatch, rows: list[list[int]]) -> Reading | None:
        """Runs the frozen layers for those rows of `batch` whose output is not kept, and says what is."""
        if self.trunk is None:
            return None
        keys, lengths = row_keys(batch), row_lengths(batch)
        missing = self.trunk.reserve(keys, lengths)
        # on CPUs alone, so that a resumed run, where rows have other neighbours, rounds as one that was not stopped
        most = 1 if self.device.type == "cpu" else self.microbatch_size
        cut = microbatches([lengths[row] for row in missing], most, self.pass_cost, most_tokens=self.microbatch_tokens)
        new = [[missing[i] for i in each] for each in cut]
        self.trunk.compute(self._microbatches(batch, new), [[keys[row] for row in each] for each in new])
        known = [[keys[row] for row in each] for each in rows]
        return Reading(self.trunk, [own if self.trunk.room.keys() >= set(own) else None for own in known])

    def _collected(self, found: list[Tensor], rows: list[list[int]], batch: TokenBatch) -> Tensor:
        """Per-token outputs of all microbatches as one [B, T] tensor on the CPU, on every stage."""
        whole = torch.zeros(batch.tokens.shape, device=self.device)
        for each, outputs in zip(rows, found, strict=False):
            width = min(outputs.shape[1], whole.shape[1])
            whole[each, :width] = outputs[: len(each), :width]
        return self.parallel.from_last_stage(whole).cpu()

    def _means(self, found: list[tuple[list[str], Tensor]]) -> dict[str, float]:
        """Global means of the last stage's metrics, on every process."""
        means = None
        if found:
            packed = merge_packed(torch.stack([rows for _, rows in found]))
            if self.data_size > 1:
                packed = merge_packed(self.parallel.gather_over_data(packed))
            means = finish(found[0][0], packed)
        return self.parallel.object_from_last_stage(means)

    def _train_mode(self, mode: bool) -> None:
        self.parallel.require_groups()
        for chunk in self.wrapped:
            chunk.train(mode)


def _refuse(needs: ModelNeeds) -> None:
    """Refuses what this backend does not support."""
    if needs.value_layers:
        raise ValueError("method.num_value_layers_unfrozen must be 0 with a NeMo trainer, which has a value head only")


def _language_models(stage: list[PolicyStage]) -> SimpleNamespace:
    return SimpleNamespace(model=nn.ModuleList(language_model(chunk) for chunk in stage))


def _wrapped(chunk: PolicyStage, distributed_optimizer: bool) -> DistributedDataParallel:
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    return DistributedDataParallel(chunk.config, config, chunk)


def _widened(rows: TokenBatch, divisor: int) -> TokenBatch:
    """`rows` with padding columns up to a multiple of `divisor`."""
    missing = -rows.tokens.shape[1] % divisor
    if not missing:
        return rows
    columns = rows.columns().items()
    return TokenBatch(**{name: x if x.ndim == 1 else nn.functional.pad(x, (0, missing)) for name, x in columns})
