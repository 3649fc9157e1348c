"""What the engine can be told: recomputation, dropout, half precision, optimizers; and what it must never do."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from tests.builders import VOCABULARY, tiny_gpt2_config
from tests.distributed.test_megatron_truth import LOSSES, NEEDS, ROWS, UNITS, layout, rows, settings, world
from tests.processes import together
from tests.waits import ON_HOST, Waits
from trlx.data.store import shard
from trlx.methods.units import Unit
from trlx.trainer.nemo import megatron_backend

pytestmark = pytest.mark.distributed

DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}


def built(algorithm="SFT", parallel=None, gpt=None, dropout=False, train=None, optimizer=None, unfrozen=-1):
    """A Megatron backend on a tiny GPT-2, with `gpt` as the ``model`` section of a NeMo-shaped file."""
    from trlx.backends.megatron.backend import MegatronBackend

    parallel = parallel or layout()
    size = parallel["tensor_model_parallel_size"] * parallel["pipeline_model_parallel_size"]
    options = settings(
        tiny_gpt2_config(layers=4, initializer_range=0.15, **(DROPOUT if dropout else {})),
        data_size=world() // size,
        unfrozen=unfrozen,
        megatron_cfg={"model": gpt or {}},
        **parallel,
    )
    options["train"] = replace(options["train"], **(train or {}))
    options["optimizer"] = replace(options["optimizer"], **(optimizer or {}))
    return MegatronBackend(**options, needs=replace(NEEDS[algorithm], dropout=dropout))


def trained(backend, algorithm="SFT", steps=2) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Metrics without seconds, and the weights of this process."""
    mine = shard(rows(), list(range(ROWS)), backend.data_rank, backend.data_size)
    torch.manual_seed(7)
    metrics = [backend.train_step(mine, LOSSES[algorithm]) for _ in range(steps)]
    numbers = [{name: value for name, value in each.items() if not name.startswith("time/")} for each in metrics]
    return numbers, {weight.name: weight.value.detach().float().clone() for weight in backend.weights.weights}


def same(found, expected, tolerance=1e-6) -> None:
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance, rel=tolerance)
    for name, weight in found[1].items():
        assert float((weight - expected[1][name]).abs().max()) <= tolerance, name


RECOMPUTE = [
    {"activations_checkpoint_granularity": "selective"},
    {"activations_checkpoint_granularity": "full", "activations_checkpoint_method": "uniform"},
    {
        "activations_checkpoint_granularity": "full",
        "activations_checkpoint_method": "block",
        "activations_checkpoint_num_layers": 1,
    },
]


def recompute(parallel) -> None:
    expected = trained(built(parallel=parallel, dropout=True))
    for gpt in RECOMPUTE:
        same(trained(built(parallel=parallel, dropout=True, gpt=gpt)), expected)


def test_recomputed_activations_change_nothing_under_dropout():
    together(4, recompute, layout(2, 2, sequence=True))


def recompute_partly_frozen() -> None:
    pairs = {**RECOMPUTE[1], "activations_checkpoint_num_layers": 2}
    for unfrozen in (1, 2):
        expected = trained(built(unfrozen=unfrozen))
        assert expected[0][0]["grad_norm"] > 0
        for gpt in (*RECOMPUTE, pairs):
            same(trained(built(unfrozen=unfrozen, gpt=gpt)), expected)


def test_recomputed_layers_above_frozen_ones_train():
    together(1, recompute_partly_frozen)


def dropout_is_one_on_tensor_ranks(parallel) -> None:
    backend = built(parallel=parallel, dropout=True)
    trained(backend)
    for weight in backend.weights.weights:
        if weight.entry.split_dim is None:
            parts = backend.parallel.gather_over_tensor_ranks(weight.value.detach())
            assert all(torch.equal(shard, parts[0]) for shard in parts), weight.name


@pytest.mark.parametrize("sequence", [False, True])
def test_weights_that_tensor_ranks_share_stay_equal_under_dropout(sequence):
    together(2, dropout_is_one_on_tensor_ranks, layout(2, sequence=sequence))


def half(parallel) -> None:
    backend = built("PPO", parallel, train={"mixed_precision": "bf16"})
    assert backend.precision is torch.bfloat16
    batch = shard(rows(), list(range(ROWS)), backend.data_rank, backend.data_size)
    batch = batch.replace(old_logprobs=backend.evaluate(batch).logprobs)
    assert torch.equal(backend.evaluate(batch).logprobs, backend.evaluate(batch, reference=True).logprobs)
    for _ in range(2):
        metrics = backend.train_step(batch, LOSSES["PPO"])
        assert metrics["skipped_steps"] == 0 and metrics["grad_norm"] > 0
    for weight in backend.weights.weights:
        assert weight.value.main_grad.dtype == torch.float32
        is_head = weight.name.startswith("heads.")
        assert weight.value.dtype == (torch.float32 if is_head else torch.bfloat16)
        if not is_head:
            main = backend.updates.optimizer_state(weight.value, "main")
            assert main.dtype == torch.float32 and torch.equal(main.bfloat16(), weight.value)


def test_bf16_keeps_float32_gradients_and_main_weights():
    together(2, half, layout(2, sequence=True))


def weights_come_back(folder, name) -> None:
    """Without the optimizer's state, in the same precision and in another one."""
    optimizer = {"name": name, "kwargs": {"lr": 1e-3, "eps": 1e-4}}
    first, second, third = (
        built("ILQL", layout(2), train={"mixed_precision": precision}, optimizer=optimizer)
        for precision in ("bf16", "bf16", None)
    )
    trained(first, "ILQL")
    first.save(folder, optimizer=False)
    first.barrier()
    for other in (second, third):
        other.load(folder)
    for mine, theirs, whole in zip(*(each.weights.weights for each in (first, second, third)), strict=True):
        main = first.updates.main_weight(mine.value)
        assert main.dtype == torch.float32
        assert torch.equal(second.updates.main_weight(theirs.value), main) and torch.equal(whole.value, main)
        assert torch.equal(theirs.value, mine.value)
    norm = next(w.value for w in third.weights.weights if w.name == "decoder.final_layernorm.weight")
    assert not torch.equal(norm, norm.bfloat16().float())
    first.load(folder)  # its running averages start anew, as those of the second one
    same(trained(first, "ILQL", steps=1), trained(second, "ILQL", steps=1), tolerance=0)


@pytest.mark.parametrize("name", ["adamw", "distributed_fused_adam"])
def test_weights_in_half_precision_come_back_in_float32(tmp_path, name):
    together(4, weights_come_back, tmp_path, name)


def optimizers() -> None:
    expected = trained(built(optimizer={"name": "adamw"}), steps=3)
    for name in ("fused_adam", "distributed_fused_adam"):
        kwargs = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01}
        same(trained(built(optimizer={"name": name, "kwargs": kwargs}), steps=3), expected)


def test_the_distributed_optimizer_takes_the_same_steps():
    together(2, optimizers)


def skips(parallel) -> None:
    backend = built("PPO", parallel)
    batch = shard(rows(), list(range(ROWS)), backend.data_rank, backend.data_size)
    batch = batch.replace(old_logprobs=backend.evaluate(batch).logprobs)
    before = {weight.name: weight.value.detach().clone() for weight in backend.weights.weights}
    rank = torch.distributed.get_rank()
    assert backend.max_across(torch.tensor([rank, -rank])).tolist() == [1, 0]
    for factor, norm in ((float("nan"), math.isnan), (1e30, math.isinf)):
        broken = batch.replace(advantages=batch.advantages * factor) if backend.data_rank == 0 else batch
        metrics = backend.train_step(broken, LOSSES["PPO"])
        assert metrics["skipped_steps"] == 1.0 and norm(metrics["grad_norm"])
        assert all(torch.equal(weight.value, before[weight.name]) for weight in backend.weights.weights)
    backend.before_update = lambda means: "losses/value_loss" not in means  # a guard that leaves it out
    left_out = backend.train_step(batch, LOSSES["PPO"])
    assert left_out["skipped_steps"] == 1.0 and "grad_norm" not in left_out
    assert all(torch.equal(weight.value, before[weight.name]) for weight in backend.weights.weights)
    gradients = [(weight.shape, gradient.shape) for _, weight, gradient in backend.trained()]
    assert gradients and all(weight == gradient for weight, gradient in gradients)
    backend.before_update = lambda means: True
    after = backend.train_step(batch, LOSSES["PPO"])
    assert after["skipped_steps"] == 0.0 and after["learning_rate_group_0"] == metrics["learning_rate_group_0"]
    assert not all(torch.equal(weight.value, before[weight.name]) for weight in backend.weights.weights)


@pytest.mark.parametrize("parallel", [layout(), layout(1, 2)], ids=["data ranks", "stages"])
def test_a_step_whose_gradients_are_not_finite_is_skipped_everywhere(parallel):
    together(2, skips, parallel)


def clips(parallel) -> None:
    free = built(parallel=parallel, train={"max_grad_norm": None}, optimizer={"name": "sgd", "kwargs": {"lr": 1.0}})
    start = {weight.name: weight.value.detach().clone() for weight in free.weights.weights}
    metrics, far = trained(free, steps=1)
    bound = metrics[0]["grad_norm"] / 4
    held = built(parallel=parallel, train={"max_grad_norm": bound}, optimizer={"name": "sgd", "kwargs": {"lr": 1.0}})
    same_norm, near = trained(held, steps=1)
    assert same_norm[0]["grad_norm"] == pytest.approx(metrics[0]["grad_norm"], rel=1e-6)
    for name, first in start.items():
        torch.testing.assert_close(near[name] - first, (far[name] - first) / 4, rtol=1e-3, atol=1e-6)


def test_gradients_are_clipped_to_the_norm_over_all_ranks():
    together(4, clips, layout(2, 2))


def never_gathers(parallel) -> None:
    from trlx.backends.megatron.vocabulary import VocabularyShard

    def refuse(*_):
        raise AssertionError("logits of the whole vocabulary were gathered")

    widest = []
    original = VocabularyShard.logprobs
    VocabularyShard.gathered = refuse
    VocabularyShard.logprobs = lambda self, logits, targets: (
        widest.append(logits.shape[1]) or original(self, logits, targets)
    )
    backend = built("ILQL", parallel, gpt={"make_vocab_size_divisible_by": 1})
    trained(backend, "ILQL", steps=1)
    assert set(widest) == {-(-VOCABULARY // 2)}


def test_logits_and_q_stay_divided_over_the_vocabulary():
    together(2, never_gathers, layout(2))


def refused(sentence, parallel, **changes) -> None:
    with pytest.raises(ValueError) as raised:
        built(parallel=parallel, **changes)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("size", "sentence", "parallel", "changes"),
    [
        (2, "num_layers", layout(1, 2, virtual=3), {}),
        (3, "start a multiple of 2", layout(1, 2), {}),
        (1, "has positions for 64 tokens: write 64 or less", layout(), {"train": {"seq_length": 65}}),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_built(size, sentence, parallel, changes):
    together(size, refused, sentence, parallel, **changes)


def test_a_value_function_with_blocks_of_its_own_is_refused():
    megatron_backend()
    from trlx.backends.megatron.backend import _refuse

    with pytest.raises(ValueError, match="which has a value head only"):
        _refuse(replace(NEEDS["PPO"], value_layers=1))


def waits_for_a_gpu() -> None:
    from megatron.core.optimizer import clip_grads

    from trlx.backends.megatron import backend as module

    stand_in = clip_grads, "l2_norm_impl"  # for a kernel of Apex
    asked = [(module.MegatronBackend, "microbatches"), (module, "row_keys"), (module, "row_lengths"), stand_in]
    # with a multiple of 3, two of six microbatches are empty, as with interleaved stages, which keep no frozen layers
    for algorithm, multiple, unfrozen in (("PPO", 3, -1), ("ILQL", 1, 1), ("Reward", 1, 1)):
        # torch's Adam counts its steps on the host, in tensors
        optimizer = {"name": "sgd", "kwargs": {"lr": 1.0}}
        backend, batch = built(algorithm, optimizer=optimizer, unfrozen=unfrozen), rows()
        backend.multiple = multiple
        batch = batch.replace(old_logprobs=torch.zeros(batch.tokens.shape))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.MegatronBackend, "sum_across", lambda self, count: count.numpy())
            with Waits(patch, *asked, *ON_HOST) as waits:
                backend.train_step(batch, LOSSES[algorithm], UNITS.get(algorithm, Unit.TOKEN))
        assert waits.found == {"_local_scalar_dense": 1, "tolist": 1}, algorithm
        assert backend.trunk is None or backend.trunk.kept


def test_a_step_of_the_engine_waits_for_a_gpu_twice_however_many_microbatches_it_has():
    together(1, waits_for_a_gpu)


def uses_of_cuda() -> None:
    """After a whole step: the engine's modules that were imported and still name CUDA in running code."""
    trained(built("ILQL", layout(1, 1)), "ILQL", steps=1)
    from trlx.backends.megatron.cpu import MODULES

    stand_ins = {f"megatron.core.{name}" for name in MODULES}
    assert all(sys.modules[name].torch.cuda.current_device() == torch.device("cpu") for name in stand_ins)
    assert torch.cuda.current_device is not sys.modules["megatron.core.utils"].torch.cuda.current_device
    named = {
        name.removeprefix("megatron.core.")
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.core") and name not in stand_ins and _names_cuda(module)
    }
    assert named <= KNOWN, f"look whether these run without CUDA: {sorted(named - KNOWN)}"


def _names_cuda(module) -> bool:
    source = Path(module.__file__).read_text() if getattr(module, "__file__", None) else ""
    return any(use in source for use in ("torch.cuda.current_device()", 'device="cuda"', "device='cuda'", ".cuda()"))


KNOWN = set(
    """
    dist_checkpointing.strategies.async_utils distributed.distributed_data_parallel
    distributed.fsdp.mcore_fsdp_adapter distributed.fsdp.src.megatron_fsdp.megatron_fsdp
    distributed.fsdp.src.megatron_fsdp.mixed_precision distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer
    distributed.fsdp.src.megatron_fsdp.uneven_dtensor distributed.fsdp.src.megatron_fsdp.utils
    extensions.transformer_engine fp8_utils fusions.fused_indices_converter inference.batch_dimensions_utils
    inference.contexts.attention_context.mamba_metadata inference.contexts.attention_context.mha_metadata
    inference.contexts.dynamic_block_allocator inference.contexts.dynamic_context inference.unified_memory
    inference.utils models.common.embeddings.yarn_rotary_pos_embedding
    models.common.language_module.language_module models.gpt.gpt_model nccl_allocator optimizer.distrib_optimizer
    optimizer.grad_scaler parallel_state pipeline_parallel.hybrid_cp_schedule pipeline_parallel.utils
    rerun_state_machine tensor_parallel.data tensor_parallel.utils timers transformer.dot_product_attention
    transformer.module transformer.moe.experts transformer.moe.moe_utils transformer.moe.router
    transformer.multi_token_prediction transformer.transformer_layer
    """.split()
)
"""Modules that are imported and name CUDA where this backend never comes, or asks whether it is there: other ways of
sharding, mixtures of experts, kernels of packages that are missing."""


def test_no_further_module_of_the_engine_needs_cuda():
    together(1, uses_of_cuda)


def test_another_version_of_the_engine_is_refused_with_a_sentence(monkeypatch):
    from trlx.backends.megatron import cpu

    monkeypatch.setattr(cpu, "version", lambda name: "0.17.2")
    with pytest.raises(ImportError, match=r"megatron-core 0.17.2 is installed.*0.16 only: run pip install"):
        cpu.prepare_engine()


def test_an_engine_that_is_only_a_folder_on_the_path_is_refused_with_a_sentence(monkeypatch):
    from trlx.backends.megatron import cpu

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(cpu, "version", version)
    with pytest.raises(ImportError, match="is not installed .a checkout of Megatron-LM.* pip install the checkout"):
        cpu.prepare_engine()


def test_the_engine_is_installed_for_these_tests():
    assert importlib.util.find_spec("megatron.core") is not None
