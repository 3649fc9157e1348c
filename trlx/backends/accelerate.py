"""The Accelerate backend: a Hugging Face model on one or many processes."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
    patch_environment,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trlx import logging
from trlx.backends.base import HALVES, PATIENCE, UPDATES_FILE, Backend, LossFn, ModelNeeds, other_weights
from trlx.backends.deepspeed import ASKED, wants_deepspeed, zero_for
from trlx.backends.microbatches import FEWEST, pass_cost
from trlx.backends.optimizer import check_settings, make_optimizer, make_scheduler, move_state
from trlx.backends.sharding import Replicated, Sharded, trainable
from trlx.background import write
from trlx.batch import TokenBatch, TokenOutputs
from trlx.checkpoint import read_optimizer, write_optimizer
from trlx.config import ModelConfig, OptimizerConfig, SchedulerConfig, TrainConfig
from trlx.methods.masked import finish, merge_packed, pack
from trlx.methods.units import Unit
from trlx.models.adapters import AdaptedPolicy, AdapterOff, adapted_model, build_adapted_policy
from trlx.models.architecture import architecture_for
from trlx.models.compiled import compile_blocks
from trlx.models.decoder import has_dropout, output_head
from trlx.models.frozen import FrozenTrunk, frozen_trunk
from trlx.models.limits import check_positions, check_vocabulary
from trlx.models.memory import bytes_per_token, free_memory, room_for_states
from trlx.models.packing import packed, why_unpackable
from trlx.models.policy import HEADS_FILE, Policy, build_policy, load_heads, load_model, save_hf
from trlx.models.reference import Reference, digest
from trlx.registry import register_sampler
from trlx.sampling.base import Sampler
from trlx.sampling.decode import DecodingSampler
from trlx.sampling.generate import TransformersSampler

logger = logging.get_logger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"


class AccelerateBackend(Backend):
    """One Hugging Face model, wrapped and moved by Accelerate."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        scheduler: SchedulerConfig,
        train: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        needs: ModelNeeds,
    ):
        check_settings(optimizer, scheduler)
        uses_deepspeed = wants_deepspeed()
        self.accelerator = _accelerator(train.mixed_precision)
        self.sharding = _sharding_for(self.accelerator, uses_deepspeed, train.max_grad_norm or float("inf"))
        if train.compile and type(self.sharding) is not Replicated:
            raise ValueError(
                "train.compile needs all weights on each process: set it to false under FSDP and under DeepSpeed"
            )
        self.can_copy_weights = self.sharding.independent
        self.can_leave_out = not uses_deepspeed
        self.device = self.accelerator.device
        self.data_rank, self.data_size = self.accelerator.process_index, self.accelerator.num_processes
        self.processes, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process
        self.tokenizer = tokenizer
        self.microbatch_size = train.minibatch_size or train.batch_size
        self.pass_cost = pass_cost(self.device) if self.sharding.independent else FEWEST
        # train mode only where it changes something, because train() visits every module
        self.uses_train_mode = needs.dropout or bool(train.gradient_checkpointing)
        self.has_values, self.has_score = needs.value_head, needs.score_head

        torch.manual_seed(train.seed)  # all processes must draw the same random weights
        self.policy = _load_policy(dataclasses.replace(model, model_path=self.source(model, train)), needs, tokenizer)
        check_vocabulary(self.policy.model.get_input_embeddings().weight.shape[0], tokenizer)
        self.drops = needs.dropout and has_dropout(self.policy.model)
        self.precision = HALVES.get(self.accelerator.mixed_precision, self.policy.model.dtype)
        self.positions = check_positions(self.policy.model, train.seq_length) or self.positions
        self.vocab_size = output_head(self.policy.model).weight.shape[0]
        if train.gradient_checkpointing:
            self.policy.architecture.recompute(selective=train.gradient_checkpointing == "selective")
        self.fingerprint = digest(self.policy)
        self.row_format = self.policy.architecture.row_format(tokenizer)
        prepared = self.sharding.prepare(self.policy, partial(make_optimizer, optimizer))
        kind = AdapterOff if isinstance(self.policy, AdaptedPolicy) else Reference
        with self.sharding.sharded():
            self.reference = kind(self.policy, self.sharding.exchange) if needs.reference else None
        with self.sharding.unsharded():
            self.starts_at_reference = self.reference is None or self.reference.is_first_policy()
        self.packs = self._packs("off" if train.compile else train.packing)
        self.microbatch_tokens = train.tokens_per_microbatch or self._tokens_that_fit(train)
        self.trunk = self._frozen_trunk(train.cache_hidden_states)
        self.move_state = self._state_mover(prepared) if train.offload_optimizer else lambda device: None
        self.scheduler_at = partial(make_scheduler, scheduler, prepared)
        self.scheduler = self.scheduler_at(0)
        self.uncompiled = compile_blocks(self.policy) if train.compile else nullcontext

    def _state_mover(self, optimizer: torch.optim.Optimizer) -> Callable[[torch.device | str], None]:
        if self.device.type == "cpu" or type(self.sharding) is not Replicated:
            raise ValueError(
                "train.offload_optimizer needs a GPU that holds all weights: set it to false on CPUs, under FSDP and "
                "under DeepSpeed"
            )
        return partial(move_state, optimizer)

    def _packs(self, setting: str) -> bool:
        # on GPUs rows of about one length in one pass are few kernels, attention row by row is many
        if setting == "off" or (setting == "auto" and not (self.device.type == "cpu" and self.sharding.independent)):
            return False
        with self.sharding.unsharded(), self.accelerator.autocast():
            reason = why_unpackable(self.policy.architecture)
        if reason and setting == "on":
            raise ValueError(f"train.packing is on, but {type(self.policy.model).__name__} {reason}: write auto")
        return reason is None

    def _tokens_that_fit(self, train: TrainConfig) -> int | None:
        # another cut draws other dropout masks, and no number may depend on the machine in more than rounding
        if train.minibatch_size or train.gradient_checkpointing or self.drops or not self.sharding.independent:
            return None
        each = bytes_per_token(self.policy)  # which Accelerate has prepared, so it rounds as in a step
        coming = 3 * sum(weight.nbytes for weight in trainable(self.policy))  # gradients and Adam's two averages
        return max(int((free_memory(self.device, self.processes) - coming) / 2 / each), 1)

    def _frozen_trunk(self, setting: str | int) -> FrozenTrunk | None:
        # sharded weights are gathered as the blocks run
        if setting == "off" or not self.sharding.independent or self.drops:
            return None
        room = room_for_states(setting, self.device, self.processes)
        return frozen_trunk(self.policy, *room, self.accelerator.autocast)

    def sampler(self, places: int | None = None) -> Sampler:
        return DecodingSampler(self.policy, self.device, self.for_sampling, places=places)

    @contextmanager
    def for_sampling(self) -> Iterator[None]:
        """The context in which a sampler runs `policy`."""
        self.move_state("cpu")
        # round as evaluate() and train_step() do
        with self.accelerator.autocast(), self.sharding.unsharded(), self.uncompiled():
            yield

    def weights_by_name(self) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self.policy, AdaptedPolicy) and not self.sharding.independent:
            raise ValueError("train.sampler: an adapter cannot be merged for a copy while FSDP or DeepSpeed shards it")
        for name, weight in self.policy.plain_weights():
            full = self.sharding.for_file(weight)
            if self.is_main:
                yield name, full.cpu()

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch, reference: bool = False) -> TokenOutputs:
        if reference and self.reference is None:
            raise ValueError("This method was built without a reference policy")
        self.policy.eval()
        self.move_state("cpu")
        logprobs = torch.zeros(batch.tokens.shape)
        values = torch.zeros(batch.tokens.shape) if self.has_values and not reference else None
        last = torch.zeros(len(batch))
        with self.reference.active() if reference else nullcontext(), self.sharding.unsharded():
            for rows in self.microbatches(batch):
                microbatch = batch.rows(rows)
                width = microbatch.tokens.shape[1]
                with self._reading(microbatch, microbatch.to(self.device)) as columns:
                    outputs = self.policy(*columns, values=values is not None)
                logprobs[rows, :width] = outputs.logprobs.cpu()
                if values is not None:
                    values[rows, :width] = outputs.values.cpu()
                if outputs.last is not None:
                    last[rows] = outputs.last.cpu()
        return TokenOutputs(logprobs, values, last=last if self.has_score else None)

    def train_step(
        self, batch: TokenBatch, loss: LossFn, unit: Unit = Unit.TOKEN, together: int = 1
    ) -> dict[str, float]:
        self.move_state(self.device)
        self.sharding.wrapped.train(self.uses_train_mode)
        self.sharding.optimizer.zero_grad()  # a step that failed may have left gradients
        # the loss is a sum; DDP averages gradients over processes, so multiply by their number
        loss_factor = self.data_size / max(float(self.sum_across(unit.count(batch))), 1.0)
        packed, seconds = [], {"time/forward": 0.0, "time/backward": 0.0}
        *others, last = self.microbatches(batch, max(unit.rows, together))
        for rows in (*others, last):
            on_host = batch.rows(rows)
            microbatch = on_host.to(self.device)
            with nullcontext() if rows is last else self.sharding.accumulating():
                began = time.perf_counter()
                with self._reading(on_host, microbatch) as columns:
                    outputs = self.sharding.wrapped(*columns)
                summed, metrics = loss(outputs, microbatch)
                halfway = time.perf_counter()
                self.sharding.backward(summed * loss_factor)
            seconds["time/forward"] += halfway - began
            seconds["time/backward"] += time.perf_counter() - halfway
            packed.append(pack(metrics))
        means = self._means(packed)
        rates = {f"learning_rate_group_{i}": float(rate) for i, rate in enumerate(self.scheduler.get_last_lr())}
        if not self.before_update(means):
            return means | {"skipped_steps": 1.0, **rates} | seconds
        norm = self.sharding.update()
        skipped = not math.isfinite(norm)
        if not skipped:
            self.scheduler.step()
        return means | {"grad_norm": norm, "skipped_steps": float(skipped), **rates} | seconds

    def forget_rows(self) -> None:
        if self.trunk is not None:
            self.trunk.forget()

    @contextmanager
    def _reading(self, on_host: TokenBatch, batch: TokenBatch) -> Iterator[tuple[Any, ...]]:
        """Yields the policy's arguments for `batch`. Inside the block it does not compute its frozen blocks again."""
        tokens, mask = on_host.tokens, on_host.attention_mask
        # rows that share a beginning would share its dropout mask
        rows = packed(tokens, mask, shares=not self.drops).to(self.device) if self.packs else None
        masks, encoder = (batch.attention_mask, batch.response_mask), (batch.encoder_tokens, batch.encoder_mask)
        with nullcontext() if self.trunk is None else self.trunk.skipped(on_host, rows, self.device):
            yield batch.tokens, *masks, *encoder, batch.at, rows

    def _means(self, found: list[tuple[list[str], Tensor]]) -> dict[str, float]:
        names = found[0][0]
        packed = merge_packed(torch.stack([rows for _, rows in found]))
        if self.data_size > 1:
            packed = merge_packed(self.accelerator.gather(packed[None]))
        return finish(names, packed)

    @torch.no_grad()
    def update_heads(self, fn: Callable[[torch.nn.Module], None]) -> None:
        with self.sharding.writing(self.policy.heads.parameters()):
            fn(self.policy.heads)

    def sum_across(self, tensor: Tensor) -> Tensor:
        if self.data_size == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.device), reduction="sum").cpu()

    def max_across(self, tensor: Tensor) -> Tensor:
        if self.data_size == 1:
            return tensor
        return self.accelerator.gather(tensor.to(self.device)[None]).amax(dim=0).cpu()

    def gather_objects(self, objects: list[Any]) -> list[Any]:
        return gather_object(objects) if self.data_size > 1 else list(objects)

    def broadcast_object(self, value: Any) -> Any:
        return broadcast_object_list([value])[0] if self.data_size > 1 else value

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def save(self, folder: Path, optimizer: bool = True) -> None:
        trained = {name: self.sharding.for_file(weight) for name, weight in self._trained().items()}
        state = self.sharding.optimizer_state() if optimizer else {}
        if not self.is_main:
            return
        write(partial(save_file, filename=folder / "policy.safetensors"), trained)
        if optimizer:
            write_optimizer(folder / OPTIMIZER_FILE, state)
        scaler = self.accelerator.scaler
        updates = {"step_count": self.scheduler.last_epoch, "scaler": scaler and scaler.state_dict()}
        (folder / UPDATES_FILE).write_text(json.dumps(updates))

    def load(self, folder: Path, optimizer: bool = True) -> None:
        saved = load_file(folder / "policy.safetensors")
        trained = self._trained()
        if saved.keys() != trained.keys():
            raise ValueError(other_weights(folder, saved.keys() ^ trained.keys()))
        for name, weight in trained.items():
            with torch.no_grad(), self.sharding.writing([weight]):
                weight.copy_(self.sharding.shard(saved[name], weight))
        if optimizer and (folder / OPTIMIZER_FILE).is_file():
            self.sharding.load_optimizer_state(read_optimizer(folder / OPTIMIZER_FILE))
        else:
            self.sharding.optimizer.state.clear()
        updates = json.loads((folder / UPDATES_FILE).read_text())
        self.scheduler = self.scheduler_at(updates["step_count"])
        # a resumed run may have another precision, and so no scaler
        if self.accelerator.scaler is not None and updates["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(updates["scaler"])

    def export_hf(self, folder: Path, merge: bool = False) -> None:
        if merge and not self.sharding.independent:
            raise ValueError(
                "An adapter cannot be merged while weights are sharded (FSDP, DeepSpeed): save it without merge=True, "
                "and merge what is saved in one process"
            )
        with self.sharding.on_main():
            if self.is_main:
                save_hf(self.policy, self.tokenizer, folder, merge)

    def parameter_counts(self) -> tuple[int, int]:
        trained = sum(_full_size(weight) for weight in self.policy.parameters() if weight.requires_grad)
        return trained, sum(map(_full_size, self.policy.parameters())) - trained

    def trained(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        return ((name, weight, weight.grad) for name, weight in self._trained().items())

    def _trained(self) -> dict[str, Tensor]:
        """The weights in a checkpoint: those that train, and all heads. The others come from model_path."""
        heads = {} if self.policy.heads is None else self.policy.heads.state_dict(prefix="heads.", keep_vars=True)
        trained = {name: weight for name, weight in self.policy.named_parameters() if weight.requires_grad}
        return dict(sorted({**trained, **heads}.items()))


@register_sampler("generate")
class GenerateSampler(TransformersSampler):
    """``train.sampler: generate``: transformers' own ``generate`` draws all samples.

    Raises:
        ValueError: the backend is another.
    """

    def __init__(self, backend: AccelerateBackend, tokenizer: PreTrainedTokenizerBase):
        if not isinstance(backend, AccelerateBackend):
            raise ValueError("train.sampler generate does not work with a NeMo trainer: leave it out")
        super().__init__(backend.policy, backend.device, backend.for_sampling)


def _accelerator(mixed_precision: str | None) -> Accelerator:
    # an earlier run of this process keeps its precision, which this one would get, too, or not be allowed to change
    AcceleratorState._shared_state = type(AcceleratorState._shared_state)()
    # Accelerate's own DeepSpeed support makes an optimizer step for every microbatch, rounds all weights and heads
    # to bfloat16, and does not run on CPUs: let it prepare plain data-parallel processes
    with patch_environment(**{ASKED: "false"}):
        accelerator = Accelerator(
            # without cpu=True, Accelerate does not connect the processes of a CPU job
            cpu=not torch.accelerator.is_available(),
            mixed_precision=mixed_precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("train.mixed_precision fp16 needs a GPU: write bf16, which works on CPUs too, or no")
    return accelerator


def _sharding_for(accelerator: Accelerator, uses_deepspeed: bool, max_grad_norm: float) -> Replicated:
    """How the processes were launched to hold the weights."""
    if accelerator.num_processes > 1:
        # Accelerate reads the same variable, but ignores it on CPUs
        if uses_deepspeed:
            return zero_for(accelerator, max_grad_norm)
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return Sharded(accelerator, max_grad_norm, FullyShardedDataParallelPlugin())
    return Replicated(accelerator, max_grad_norm)


def _full_size(weight: Tensor) -> int:
    """The number of elements, also of a weight that is sharded or packed."""
    if hasattr(weight, "ds_numel"):  # ZeRO-3
        return weight.ds_numel
    packed = getattr(weight, "quant_state", None)  # 4 bits
    return math.prod(packed.shape) if packed is not None else weight.numel()


def _load_policy(model: ModelConfig, needs: ModelNeeds, tokenizer: PreTrainedTokenizerBase) -> Policy:
    adapted = adapted_model(model.model_path)
    source, options = adapted or model.model_path, model.model_extra_configs
    architecture = architecture_for(source, model.model_arch_type, options, needs.score_head)
    language_model = load_model(source, options, architecture)
    if needs.score_head:
        architecture.prepare(language_model, tokenizer)
    adapter = model.peft_config if adapted is None else model.model_path
    settings = dataclasses.asdict(needs) | {"architecture": architecture}
    del settings["reference"], settings["score_head"]
    if adapter is None:
        policy = build_policy(language_model, num_layers_unfrozen=model.num_layers_unfrozen, **settings)
    else:
        if model.num_layers_unfrozen != -1:  # no warning, because a preset may have set it
            logger.info("With an adapter only the adapter and the heads train, whatever model.num_layers_unfrozen says")
        if adapted is not None and model.peft_config is not None:
            logger.warning(f"model.peft_config is ignored: {model.model_path} is an adapter, which trains on")
        policy = build_adapted_policy(language_model, adapter, **settings)
    if (
        policy.heads is not None
        and isinstance(model.model_path, str)
        and (Path(model.model_path) / HEADS_FILE).is_file()
    ):
        load_heads(policy, model.model_path)
    return policy
