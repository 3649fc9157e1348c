"""Mixed precision, and which optimizer a name stands for."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import Parameter

from tests.builders import tiny_gpt2_config
from tests.runs import metrics, run
from tests.unit.test_frozen import ROWS, backend_of
from trlx.backends import accelerate
from trlx.backends import optimizer as optimizers
from trlx.backends.optimizer import check_settings, make_optimizer, make_scheduler
from trlx.config import OptimizerConfig, SchedulerConfig
from trlx.models import packing
from trlx.models.memory import bytes_per_token

BF16 = {"train": {"mixed_precision": "bf16"}, "model": {"model_path": tiny_gpt2_config()}}


@pytest.fixture
def multiplied(monkeypatch):
    """The dtypes of what linear layers return, of any run in the test."""
    seen = set()
    linear = torch.nn.functional.linear

    def watched(*args):
        result = linear(*args)
        seen.add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    return seen


def test_ppo_in_bf16_starts_at_the_reference_with_a_ratio_of_one(tmp_path, multiplied):
    trainer = run("PPO", tmp_path, **BF16)
    assert torch.bfloat16 in multiplied and trainer.backend.precision is torch.bfloat16
    trainer.backend.policy.heads = None  # the value head is always in float32
    multiplied.clear()
    trainer.generate("ab")
    assert multiplied == {torch.bfloat16}
    first = next(line for line in metrics(tmp_path) if "policy/kl" in line)
    assert first["policy/kl"] == 0.0
    assert first["policy/ratio_deviation/max"] < 1e-5
    assert all(weight.dtype == torch.float32 for weight in trainer.backend.policy.parameters())
    assert all(line["skipped_steps"] == 0 for line in metrics(tmp_path) if "skipped_steps" in line)


def test_every_run_of_a_process_has_its_own_precision(tmp_path, monkeypatch):
    halves = {"bf16": torch.bfloat16, "no": torch.float32, None: torch.float32, False: torch.float32}
    backends = {asked: backend_of(tmp_path, mixed_precision=asked) for asked in halves}
    assert {asked: backend.precision for asked, backend in backends.items()} == halves
    first = backends["bf16"].evaluate(ROWS).logprobs
    assert torch.equal(backend_of(tmp_path, mixed_precision="bf16").evaluate(ROWS).logprobs, first)
    assert not torch.equal(backends["no"].evaluate(ROWS).logprobs, first)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert backend_of(tmp_path).precision is torch.bfloat16 and backends[None].precision is torch.float32


def test_frozen_blocks_whose_output_is_kept_round_as_the_model_does(tmp_path):
    backend = backend_of(tmp_path, mixed_precision="bf16")
    found = backend.evaluate(ROWS)
    backend.trunk = None
    torch.testing.assert_close(found.logprobs, backend.evaluate(ROWS).logprobs, atol=1e-5, rtol=0)


def test_packed_rows_are_tried_in_the_precision_of_the_training(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(packing, "kernel_for", lambda device, dtype, width: seen.append(dtype))
    assert backend_of(tmp_path, mixed_precision="bf16", packing="on").packs
    assert set(seen) == {torch.bfloat16}


def test_a_pass_in_bf16_has_more_tokens_and_less_where_processes_share_the_memory(tmp_path, monkeypatch):
    policy = backend_of(tmp_path).policy
    each, trained = bytes_per_token(policy), sum(w.nbytes for w in policy.parameters() if w.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        half = bytes_per_token(policy)
    # matrix products keep half, norms as much as before; copies of the weights do not count
    assert 0.5 * each < half < 0.7 * each < trained
    free = 3 * trained + 2 * 40 * half
    monkeypatch.setattr(accelerate, "free_memory", lambda _, processes: 2 * free // processes)
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 2)
    assert backend_of(tmp_path, mixed_precision="bf16").microbatch_tokens == 40


def test_sft_in_bf16_learns_as_in_float32(tmp_path):
    longer = {"total_steps": 20}
    losses = {}
    for precision in ("bf16", "no"):
        run("SFT", tmp_path / precision, train={**longer, "mixed_precision": precision}, model=BF16["model"])
        losses[precision] = [line["loss"] for line in metrics(tmp_path / precision) if "loss" in line]
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], abs=0.05)
    assert losses["bf16"][-1] < 0.9 * losses["bf16"][0]


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU: write bf16"):
        run("SFT", tmp_path, train={"mixed_precision": "fp16"})


def made(name: str, *parameters: Parameter, **kwargs):
    return make_optimizer(OptimizerConfig(name, kwargs), parameters or [Parameter(torch.ones(2))])


@pytest.mark.parametrize(
    ("name", "cls"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_torch_optimizers_are_fused_unless_told_otherwise(name, cls):
    assert type(made(name, lr=0.1)) is cls
    assert made(name, lr=0.1).defaults["fused"] is True
    assert made(name, lr=0.1, fused=False).defaults["fused"] is False
    weights = [Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    both = [made(name, weight, lr=0.1, fused=fused) for weight, fused in zip(weights, (True, False), strict=True)]
    for step in range(5):
        for weight, optimizer in zip(weights, both, strict=True):
            weight.grad = torch.tensor([0.1 * step, -1.0])
            optimizer.step()
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adam_8bit_bnb", "adamw_8bit_bnb"])
def test_8_bit_optimizers_say_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r'needs bitsandbytes, .* pip install "trlx\[bnb\]"'):
        made(name, lr=0.1)


class OnGPU(Parameter):
    """A parameter that says it is on a GPU."""

    is_cuda = True


class FusedAdam(torch.optim.SGD):
    """Stands for apex's."""

    def __init__(self, parameters, lr, adam_w_mode):
        super().__init__(parameters, lr)
        self.adam_w_mode = adam_w_mode


@pytest.fixture
def apex(monkeypatch):
    package, module = ModuleType("apex"), ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)


def test_apex_is_used_on_a_gpu_where_it_is_installed(apex):
    weight = OnGPU(torch.ones(2))
    assert made("adamw", weight, lr=0.1).adam_w_mode is True
    assert made("adam", weight, lr=0.1).adam_w_mode is False
    assert type(made("adamw", weight, lr=0.1, fused=False)) is torch.optim.AdamW
    assert type(made("adamw", weight, lr=0.1, amsgrad=True, fused=False)) is torch.optim.AdamW
    assert type(made("adamw", lr=0.1)) is torch.optim.AdamW  # on a CPU


def test_apex_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    assert type(made("adamw", OnGPU(torch.ones(2)), lr=0.1, fused=False)) is torch.optim.AdamW
    with monkeypatch.context() as context:
        context.setitem(optimizers.OPTIMIZERS, "adamw", lambda parameters, **kwargs: kwargs)
        assert made("adamw", OnGPU(torch.ones(2)), lr=0.1) == {"lr": 0.1, "fused": True}


def test_settings_that_are_null_are_left_out():
    optimizer = OptimizerConfig("adamw", {"lr": 0.5, "eps": None})
    linear = {"T_max": None, "eta_min": None, "start_factor": 0.5, "total_iters": None}
    schedule = SchedulerConfig("linear", linear)
    check_settings(optimizer, schedule)
    made = make_optimizer(optimizer, [Parameter(torch.zeros(2))])
    assert made.defaults["eps"] == 1e-8
    assert make_scheduler(schedule, made).get_last_lr() == [0.25]
