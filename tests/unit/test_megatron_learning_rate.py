"""The learning rate of every step, worked by hand and compared with torch's schedules."""

import pytest
import torch

from tests.unit.megatron_configs import model, read
from trlx.backends.megatron.learning_rate import Annealing, Constant, Ramp
from trlx.strict import ConfigError


def test_the_cosine_falls_from_the_peak_to_the_smallest_rate():
    # 2 + (10 - 2) (1 + cos(pi p)) / 2 at p = 0, 1/4, 1/2, 1
    schedule = Annealing("cosine", max_steps=8, min_lr=2.0)
    expected = [10.0, 6 + 4 * 0.5**0.5, 6.0, 2.0]
    assert [schedule.rate(step, 10.0) for step in (0, 2, 4, 8)] == pytest.approx(expected, abs=1e-9)
    assert schedule.rate(1000, 10.0) == 2.0


def test_warm_up_is_linear_and_ends_at_the_peak_before_the_fall():
    # (step + 1) / 4 up to step 3, then half of the fall (3 to 7) at step 5
    schedule = Annealing("cosine", max_steps=7, warmup_steps=3)
    assert [schedule.rate(step, 8.0) for step in range(4)] == pytest.approx([2.0, 4.0, 6.0, 8.0])
    assert [schedule.rate(step, 8.0) for step in (5, 7)] == pytest.approx([4.0, 0.0], abs=1e-9)


def test_constant_steps_end_the_fall_early():
    schedule = Annealing("linear", max_steps=10, constant_steps=6, min_lr=1.0)
    assert [schedule.rate(step, 5.0) for step in (0, 1, 2, 3, 4, 5, 9)] == pytest.approx([5, 4, 3, 2, 1, 1, 1])


def test_more_constant_steps_than_steps_leave_the_smallest_rate_after_warm_up():
    # as in the files of the original, where constant_steps is in the millions
    assert (
        read(model(optim={"lr": 3.0, "sched": {"constant_steps": 1e12, "min_lr": 2.0}})).optim.schedule.rate(0, 3) == 2
    )
    schedule = Annealing("cosine", max_steps=4, constant_steps=100, warmup_steps=1, min_lr=2.0)
    assert [schedule.rate(step, 4.0) for step in (0, 1, 2)] == [2.0, 4.0, 2.0]


def test_a_constant_rate_may_warm_up():
    assert [Constant(1).rate(step, 4.0) for step in (0, 1, 50)] == [2.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("name", "kwargs", "torch_class"),
    [
        ("cosine_annealing", {"T_max": 7, "eta_min": 0.25}, torch.optim.lr_scheduler.CosineAnnealingLR),
        ("linear", {"start_factor": 0.5, "end_factor": 0.1, "total_iters": 4}, torch.optim.lr_scheduler.LinearLR),
        ("linear", {}, torch.optim.lr_scheduler.LinearLR),
    ],
)
def test_schedules_by_torchs_names_are_torchs(name, kwargs, torch_class):
    schedule = read(optimizer={"kwargs": {"lr": 2.0}}, scheduler={"name": name, "kwargs": kwargs}).optim.schedule
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    reference = torch_class(optimizer, **kwargs)
    for step in range(7):
        assert schedule.rate(step, 2.0) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"name": "CosineAnnealing", "kwargs": {"min_lr": 1e-6}}, Annealing("cosine", 100, min_lr=1e-6)),
        ({"name": "WarmupAnnealing", "kwargs": {"warmup_steps": 3}}, Annealing("linear", 100, warmup_steps=3)),
        ({"name": "warmuppolicy", "kwargs": {"warmup_steps": 3}}, Constant(3)),
        ({"name": "constant"}, Constant(0)),
        ({"name": "linear", "kwargs": {"total_iters": 9}}, Ramp(total_iters=9)),
    ],
)
def test_the_schedulers_section_is_read_by_both_families_of_names(scheduler, expected):
    assert read(optimizer={"kwargs": {"lr": 1e-5}}, scheduler=scheduler).optim.schedule == expected


@pytest.mark.parametrize(
    ("sched", "words"),
    [
        ({"name": "CosineAnealing"}, "unknown schedule 'CosineAnealing'. Did you mean 'CosineAnnealing'.*WarmupPolicy"),
        ({"min_lr": 2e-3}, r"sched.min_lr is 0.002, more than the optimizer's lr 0.001"),
        ({"warm_up": 2}, "Unknown key 'megatron_cfg.model.optim.sched.warm_up'. Did you mean 'model.optim.sched.warm"),
        ({"warmup_steps": -1}, "sched.warmup_steps must be a whole number of at least 0, got -1"),
    ],
)
def test_a_wrong_schedule_says_what_to_write(sched, words):
    with pytest.raises(ConfigError, match=words):
        read(model(optim={"lr": 1e-3, "sched": sched}))


def test_two_names_for_one_thing_are_refused():
    with pytest.raises(ConfigError, match="scheduler.kwargs has both max_steps and T_max"):
        read(scheduler={"name": "CosineAnnealing", "kwargs": {"T_max": 3, "max_steps": 4}})
