"""What a process of the Megatron backend holds and sends in one optimizer step, beside what `trlx plan` says.

    torchrun --nproc-per-node 4 -m benchmarks.megatron_memory

Tiny models on CPUs. Kept activations are the storages that autograd saves, weights left out, at their peak; traffic is
counted where torch.distributed is called.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trlx.backends.base import ModelNeeds
from trlx.batch import Rollout, TokenBatch
from trlx.config import ModelConfig, OptimizerConfig, SchedulerConfig, TrainConfig
from trlx.data.collate import collate
from trlx.launch.plan.memory import activations, computed_again, memory, score_activations
from trlx.launch.plan.parameters import parameters
from trlx.launch.plan.run import Run
from trlx.launch.plan.traffic import messages

NEEDS = {
    "PPO": ModelNeeds(value_head=True, reference=True, dropout=False),
    "ILQL": ModelNeeds(value_head=True, q_heads=2, dropout=False),
    "SFT": ModelNeeds(dropout=False),
    "Reward": ModelNeeds(score_head=True, dropout=False),
}
SMALL = 64
"""Bytes below which a message is a count, a norm or the shape of a tensor that follows."""


@dataclass(frozen=True)
class Case:
    """One step of one tiny run; every row has `length` tokens."""

    model: Any
    """A Hugging Face configuration."""
    layout: dict[str, Any] = field(default_factory=dict)
    """As in ``train.trainer_kwargs``."""
    algorithm: str = "SFT"
    microbatches: int = 4
    rows: int = 2
    length: int = 32
    response: int = 24
    unfrozen: int = -1
    optimizer: str = "adamw"
    precision: str | None = None
    recompute: dict[str, Any] = field(default_factory=dict)


def build(case: Case):
    """(backend, the same run on paper) on this process."""
    from tests.builders import char_tokenizer
    from trlx.backends.megatron.backend import MegatronBackend
    from trlx.backends.megatron.settings import read_settings

    model = {f"activations_checkpoint_{key}": value for key, value in case.recompute.items()}
    kwargs = {**case.layout, "megatron_cfg": {"model": model | {"make_vocab_size_divisible_by": 8}}}
    train = TrainConfig(
        total_steps=10,
        seq_length=case.length,
        epochs=1,
        batch_size=case.rows * case.microbatches,
        minibatch_size=case.rows,
        checkpoint_interval=10,
        eval_interval=10,
        pipeline="PromptPipeline",
        trainer="any",
        trainer_kwargs=kwargs,
        mixed_precision=case.precision,
        cache_hidden_states="off",  # the plan is of rows that the frozen layers have not read
    )
    sections = {
        "model": ModelConfig(case.model, num_layers_unfrozen=case.unfrozen),
        "optimizer": OptimizerConfig(case.optimizer, {"lr": 1e-3}),
        "scheduler": SchedulerConfig("constant", {}),
        "train": train,
    }
    needs = NEEDS[case.algorithm]
    backend = MegatronBackend(**sections, tokenizer=char_tokenizer(), needs=needs)
    settings = read_settings(kwargs, **sections)
    run = Run(
        shape=backend.model_source.decoder,
        parallel=settings.sizes,
        data=backend.data_size,
        rows=case.rows,
        microbatches=case.microbatches,
        length=case.length,
        response=case.response,
        element=settings.dtype.itemsize,
        recompute=settings.recompute,
        distributed=settings.optim.distributed,
        needs=needs,
        unfrozen=case.unfrozen,
        divisor=settings.make_vocab_size_divisible_by,
    )
    return backend, run


def measure(case: Case) -> dict[str, Any]:
    """By name, (measured, on paper) for this process. Called on every process of a job."""
    backend, run = build(case)
    stage, weights = backend.parallel.stage, [w for chunk in backend.stage for w in chunk.parameters()]
    with counted_messages() as sent, kept_activations(weights) as kept:
        backend.train_step(batch(case), scored)
    count, paper = parameters(run, stage), memory(run, stage)
    on_paper = activations(run, stage)
    on_paper += max(score_activations(run, stage), computed_again(run, stage))
    optimizer = backend.updates.engine.optimizer
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim()]
    main = [w for group in optimizer.param_groups for w in group["params"]] if run.element < 4 else []
    buffers = [buffer.grad_data for chunk in backend.wrapped for buffer in chunk.buffers]
    kept_reference = backend.reference._kept if backend.reference is not None else []
    return {
        "parameters": (sum(w.numel() for w in weights), count.model + count.heads),
        "weights": (size_of(weights), paper.weights),
        "gradients": (size_of(buffers), paper.gradients),
        "moments": (size_of(state), paper.moments),
        "main weights": (size_of(w for w in main if id(w) not in set(map(id, weights))), paper.main_weights),
        "reference": (size_of(kept_reference), paper.reference),
        "activations": (kept.peak, on_paper),
        "messages": (+sent, expected_messages(run, stage)),
    }


def expected_messages(run: Run, stage: int) -> Counter:
    """Bytes by (group, kind)."""
    found: Counter = Counter()
    for message in messages(run, stage):
        if message.size > SMALL:
            found[message.group, message.kind] += message.size * message.times
    return found


def batch(case: Case) -> TokenBatch:
    """Rows of one length."""
    prompt = [5] * (case.length - case.response)
    return collate([Rollout(prompt, [6] * case.response)] * (case.rows * case.microbatches), 0)


def scored(outputs: Any, microbatch: TokenBatch) -> tuple[Tensor, dict]:
    """A loss that every output has a part in."""
    parts = [outputs.logprobs, outputs.values, outputs.q, outputs.q_logprobs, outputs.last]
    return sum(shard.sum() for shard in parts if shard is not None) * 0.01, {}


def size_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Kept:
    """Bytes of the storages that autograd holds, and their peak."""

    def __init__(self, weights: list[Tensor]):
        self.holders: Counter = Counter()
        self.without = {w.untyped_storage().data_ptr() for w in weights}
        self.bytes = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        return tensor if storage.data_ptr() in self.without else _Held(self, tensor.detach(), storage.data_ptr())

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        return kept.tensor if isinstance(kept, _Held) else kept


class _Held:
    """One saved tensor, for as long as autograd keeps it."""

    def __init__(self, kept: Kept, tensor: Tensor, key: int):
        self.kept, self.tensor, self.key = kept, tensor, key
        kept.holders[key] += 1
        if kept.holders[key] == 1:
            kept.bytes += tensor.untyped_storage().nbytes()
            kept.peak = max(kept.peak, kept.bytes)

    def __del__(self):
        self.kept.holders[self.key] -= 1
        if not self.kept.holders[self.key]:
            self.kept.bytes -= self.tensor.untyped_storage().nbytes()


@contextlib.contextmanager
def kept_activations(weights: list[Tensor]) -> Iterator[Kept]:
    """Watches what autograd saves inside the block."""
    kept = Kept(weights)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        yield kept


@contextlib.contextmanager
def counted_messages() -> Iterator[Counter]:
    """Counts bytes by (group, kind) inside the block, where more than one process takes part."""
    from megatron.core import parallel_state as state

    names = {
        id(state.get_tensor_model_parallel_group()): "tensor",
        id(state.get_pipeline_model_parallel_group()): "pipeline",
        id(state.get_data_parallel_group(with_context_parallel=True)): "data",
        id(state.get_data_parallel_group()): "data",
        id(state.get_embedding_group(check_initialized=False)): "embedding",
    }
    counted: Counter = Counter()

    def note(kind: str, tensor: Tensor, group: Any) -> None:
        size = tensor.numel() * tensor.element_size()
        if group is not None and dist.get_world_size(group) > 1 and size > SMALL:
            counted["pipeline" if kind == "send" else names.get(id(group), "other"), kind] += size

    with contextlib.ExitStack() as stack:
        for places, name, kind, whole in _places():
            noting = _noting(getattr(places[0], name), note, kind, whole)
            for place in places:
                stack.enter_context(_replaced(place, name, noting))
        yield counted


def _places() -> Iterator[tuple[list[Any], str, str, int]]:
    """Where a function is found, its name there, what to call it, and which argument is the whole tensor."""
    import torch.distributed.distributed_c10d as c10d
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import layers, mappings

    yield [dist], "all_reduce", "all_reduce", 0
    # sends in a batch are compared with the one that c10d knows
    yield [dist, c10d], "isend", "send", 0
    for module in (mappings, layers, param_and_grad_buffer):
        yield [module], "dist_all_gather_func", "all_gather", 0
        yield [module], "dist_reduce_scatter_func", "reduce_scatter", 1


def _noting(call: Any, note: Any, kind: str, whole: int) -> Any:
    def noting(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if kind == "send" and group is None and len(args) > 2:
            group = args[2]
        tensor = args[whole] if len(args) > whole else kwargs["tensor"]
        note(kind, tensor, group)
        return call(*args, **kwargs)

    return noting


@contextlib.contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, original)


def main() -> None:
    """Prints (measured, on paper) of each process for one layout of a small GPT-2 trained by PPO."""
    from tests.builders import tiny_gpt2_config
    from trlx.backends.megatron.cpu import prepare_engine

    prepare_engine()
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    found = measure(Case(tiny_gpt2_config(layers=4, hidden=64, n_head=4), layout, "PPO"))
    for rank in range(dist.get_world_size()):
        dist.barrier()
        if rank == dist.get_rank():
            print(f"process {rank}", *(f"  {name}: {both}" for name, both in found.items()), sep="\n", flush=True)


if __name__ == "__main__":
    main()
