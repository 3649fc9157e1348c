"""The speed benchmarks: that all contenders do the same work, on tiny sizes. Nothing here looks at the times."""

import itertools
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from benchmarks.metrics_cost import shares
from benchmarks.search_budget import GRID, summary
from benchmarks.speed.ours import trainer_of
from benchmarks.speed.plain import PlainPPO, left_padded
from benchmarks.speed.run import check_alike, ratios, runner
from benchmarks.speed.stopwatch import Stopwatch
from benchmarks.speed.workloads import PERIOD, WORKLOADS, Reward, answers, prompts, tiny
from trlx.batch import Sample

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
PAIRS = [(name, contender) for name, load in WORKLOADS.items() if load.ragged for contender in load.contenders]
MARKED = [
    pytest.param(*pair, marks=[needs_trl, pytest.mark.filterwarnings("ignore")] if "trl" in pair[1] else [])
    for pair in PAIRS
]


@pytest.mark.parametrize(("workload", "contender"), MARKED)
def test_contenders_sample_responses_of_the_same_lengths_and_train_as_many_tokens(workload, contender):
    load = tiny(WORKLOADS[workload])
    found = {name: runner(name)(load) for name in ("trlx", contender)}
    check_alike(found)
    asked = sorted(ids[-1] % PERIOD for ids in prompts(load) for _ in range(load.group))
    given = sum(len(prompt) - 1 + len(answer) + 1 for prompt, answer in zip(prompts(load), answers(load), strict=True))
    twice = sorted(asked * 2), sum(asked)  # two iterations sample, the tokens of the second count
    expected = {"sft": ([], given), "sampling": (asked, 0), "ppo": twice, "grpo": twice}
    if load.task in expected:
        assert (found["trlx"]["lengths"], found["trlx"]["tokens"]) == expected[load.task]
    assert found["trlx"]["total"] == pytest.approx(sum(found["trlx"][phase] for phase in Stopwatch().seconds))


def test_metrics_are_a_part_of_a_step():
    found = shares(tiny(WORKLOADS["gpt2-small"]))
    assert 0 < found["metrics"] < found["step"]


@pytest.mark.parametrize("workload", ["gpt2-small-ragged", "gpt2-small-ragged-2-blocks", "llama-160m-ragged"])
def test_the_plain_loop_learns_what_trlx_learns_from_the_same_responses(workload, tmp_path):
    load = replace(tiny(WORKLOADS[workload]), lr=1e-3, epochs=3, warm_up=0)
    trainer = trainer_of(load, str(tmp_path), lambda outputs: Reward()(outputs))
    policy, plain, asked = trainer.backend.policy, PlainPPO(load), prompts(load)
    for model, weights in ((plain.model, policy.model), (plain.reference, policy.model)):
        model.load_state_dict(weights.state_dict())
    plain.value.load_state_dict(policy.value_head.layers.state_dict())
    tokens, attention = left_padded(asked)
    tokens, mask = plain.generate(tokens, attention)
    drawn = {
        tuple(ids): row[used].tolist() for ids, row, used in zip(asked, tokens[:, -mask.shape[1] :], mask, strict=True)
    }
    plain.generate = lambda *_: (tokens, mask)
    trainer.sampler.generate = lambda rows, sampling: [Sample(drawn[tuple(ids)]) for ids in rows]
    trainer.save = lambda *_: None

    plain.iteration(asked, Reward(), Stopwatch())
    trainer.learn()

    with torch.no_grad():
        batch = tokens, torch.cat([attention, mask.long()], dim=1), mask
        before, after = (plain.logprobs(model, *batch)[0] for model in (plain.reference, plain.model))
        plain.model.load_state_dict(policy.model.state_dict())
        torch.testing.assert_close(after, plain.logprobs(plain.model, *batch)[0], rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 0.05


@pytest.mark.parametrize("contender", ["trlx", "plain"])
def test_a_workload_of_full_length_runs(contender):
    found = runner(contender)(tiny(WORKLOADS["randomwalks"]))
    assert len(found["lengths"]) == 8


def test_contenders_that_do_other_work_are_refused():
    with pytest.raises(RuntimeError, match="tokens of plain are 8, of trlx 9"):
        check_alike({"trlx": {"lengths": [4, 5], "tokens": 9}, "plain": {"lengths": [4, 5], "tokens": 8}})


def test_a_ratio_is_of_one_turn():
    ours = [{"total": total, **dict.fromkeys(("generate", "reward", "score", "update"), 0.0), "peak_mib": 10.0}
            for total in (1.0, 6.0, 4.0)]  # fmt: skip
    others = [run | {"total": 2.0, "peak_mib": 20.0} for run in ours]
    found = ratios(ours, others)
    assert found == {
        "total": {"min": 0.5, "median": 2.0, "max": 3.0},
        "peak_mib": {"min": 0.5, "median": 0.5, "max": 0.5},
    }


def test_a_second_counts_under_the_inner_phase_alone(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: float(next(seconds)))
    watch = Stopwatch()  # at 0
    with watch.within("score"):  # 1: rest had 1 s
        with watch.within("generate"):  # 2
            pass  # 3
        watch.timed("reward", lambda: None)()  # 4 and 5
    found = watch.result()  # 6 ends the score, 7 the rest
    assert found == {"generate": 1, "reward": 1, "score": 3, "update": 0, "rest": 2, "total": 7, "tokens": 0}


def test_a_search_counts_settings_that_do_not_reach_the_goal_as_the_slowest():
    assert len(set(GRID)) == 12
    pairs = [(5.0, True), (7.0, True)], [(1.0, False), (1.0, True)], [(3.0, True), (4.0, True)]
    settings = [
        {seed: {"seconds": seconds, "reached": reached} for seed, (seconds, reached) in enumerate(pair)}
        for pair in pairs
    ]
    found = summary({"grpo": dict(enumerate(settings)), "trl-grpo": {"0": settings[0]}, "trl-rloo": {"0": settings[1]}})
    assert found["grpo"] == {"settings": 3, "reached": 2, "best": 3.5, "median": 6.0}
    assert found["trl-rloo"] == {"settings": 1, "reached": 0, "best": None, "median": None}
    assert found["ratios"] == {"grpo / trl-grpo, best": 3.5 / 6.0, "grpo / trl-grpo, median": 1.0}
