import threading

import numpy as np
import pytest
import torch

from tests.builders import char_tokenizer
from trlx.batch import Rollout
from trlx.rewards.calling import Arguments
from trlx.rewards.scoring import Metric, RewardError, Scorer

ROLLOUTS = [
    Rollout([1, 4, 5], [6, 2], metadata={"label": "x"}),
    Rollout([0, 4], [6, 7, 6], metadata={"label": "y"}),
]


def returning(value):
    return lambda **given: value


def scores(tokenizer, reward_fn, rollouts=ROLLOUTS):
    return [scored.score for scored in Scorer(reward_fn, tokenizer).score(rollouts)]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.0],
        (1, 2),
        np.array([1, 2]),
        torch.tensor([1.0, 2.0], requires_grad=True),
        torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16),
        [[1.0], [2]],
        [torch.tensor(1.0), np.float32(2)],
        [torch.tensor([1.0]), np.array([2])],
    ],
)
def test_scalars_come_as_any_list_array_or_tensor(tokenizer, returned):
    found = scores(tokenizer, returning(returned))
    assert found == [1.0, 2.0]
    assert {type(score) for score in found} == {float}


@pytest.mark.parametrize(
    "returned",
    [
        [[1, 2], [3, 4, 5]],
        [(1, 2), (3, 4, 5)],
        [torch.tensor([1, 2]), np.array([3.0, 4, 5])],
        [[1, torch.tensor(2)], [3, 4, 5]],
    ],
)
def test_dense_scores_are_one_number_per_response_token(tokenizer, returned):
    assert scores(tokenizer, returning(returned)) == [[1.0, 2.0], [3.0, 4.0, 5.0]]


def test_dense_scores_that_end_early_are_zeros_from_there(tokenizer):
    assert scores(tokenizer, returning([[1, 2], [3, 4]])) == [[1.0, 2.0], [3.0, 4.0, 0.0]]


def test_lists_of_one_number_are_scalars_where_all_are_and_else_stand_at_the_first_token(tokenizer):
    assert scores(tokenizer, returning([[1], [2]])) == [1.0, 2.0]
    assert scores(tokenizer, returning([[1], [2, 3]])) == [[1.0, 0.0], [2.0, 3.0, 0.0]]
    assert scores(tokenizer, returning([[1], 2])) == [[1.0, 0.0], 2.0]
    assert scores(tokenizer, returning([[1]]), ROLLOUTS[:1]) == [1.0]


def test_a_response_without_tokens_may_have_a_dense_score_without_numbers_or_one_number(tokenizer):
    assert scores(tokenizer, returning([[], [1.0]]), [Rollout([4], []), Rollout([4], [])]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "1 entries for 2 samples; first sample: 'abc'"),
        (None, "one entry per sample, got None"),
        (1.0, "one entry per sample, got 1.0"),
        ({"a": 1}, "reward_fn's 'a' must return one entry per sample, got 1"),
        ({"a": [1.0, 2.0], "b": [1.0]}, "reward_fn's 'b' returned 1 entries for 2 samples"),
        ({"a": [1.0, 2.0], "b": [1.0, None]}, "reward_fn's 'b' returned None, which is neither .* sample 1: 'acdc'"),
        ({"mean": [1.0, 2.0]}, "No part of a reward can be called 'mean': reward/mean is another number"),
        ({1: [1.0, 2.0], "1": [3.0, 4.0]}, "No part of a reward can be called '1': reward/1 is another number"),
        ({}, "must return a dict of lists by name, got {}"),
        ([1.0, None], "None, which is neither .* sample 1: 'acdc'"),
        ([1.0, "2"], "'2', which is neither .* sample 1: 'acdc'"),
        ([1.0, []], r"\[\], which is neither .* sample 1: 'acdc'"),
        ([[[1.0]], [[2.0]]], r"\[\[1.0\]\], which is neither .* sample 0: 'abc'"),
        ([1.0, [[1.0]]], r"\[\[1.0\]\], which is neither .* sample 1: 'acdc'"),
        ([1.0, float("nan")], "nan, which is not finite, for sample 1: 'acdc'"),
        ([float("inf"), 1.0], "inf, which is not finite, for sample 0: 'abc'"),
        ([1.0, [1.0, float("nan")]], "nan.*, which is not finite, for sample 1: 'acdc'"),
        ([1.0, [1.0] * 4], r"4 numbers, but the response has 3 tokens \(see output_ids\), for sample 1: 'acdc'"),
    ],
)
def test_a_wrong_score_is_an_error_that_shows_the_sample(tokenizer, returned, message):
    with pytest.raises(RewardError, match=message):
        Scorer(returning(returned), tokenizer).score(ROLLOUTS)


def test_a_time_out_of_reward_fns_own_is_not_taken_for_ours(tokenizer):
    def reward_fn(**given):
        raise TimeoutError("server")

    with pytest.raises(RewardError, match="reward_fn raised TimeoutError: server"):
        Scorer(reward_fn, tokenizer).score(ROLLOUTS)


def test_a_reward_fn_that_hangs_is_given_up(tokenizer):
    release = threading.Event()
    scorer = Scorer(lambda **given: release.wait(), tokenizer, timeout=0.05)
    jobs = [scorer.submit(ROLLOUTS), scorer.submit(ROLLOUTS)]
    for job in jobs:
        with pytest.raises(RewardError, match="train.reward_timeout = 0.05 seconds; first sample"):
            job.result()
    release.set()


def test_a_call_that_waits_for_another_has_all_its_time_once_it_starts(tokenizer):
    release = threading.Event()

    def reward_fn(samples, **given):
        release.wait()
        return [0.0] * len(samples)

    scorer = Scorer(reward_fn, tokenizer, timeout=60)
    scorer.submit(ROLLOUTS)
    waiting = scorer.submit(ROLLOUTS)
    threading.Timer(0.05, release.set).start()
    assert [scored.score for scored in waiting.result()] == [0.0, 0.0]


def test_a_long_sample_is_shown_shortened(tokenizer):
    with pytest.raises(RewardError) as caught:
        Scorer(returning(None), tokenizer).score([Rollout([4], [5] * 2000 + [6])])
    assert len(str(caught.value)) < 500
    assert str(caught.value).endswith("bc'")


def test_scoring_goes_on_beside_the_caller_one_call_at_a_time(tokenizer):
    release, threads = threading.Event(), []

    def reward_fn(samples, **given):
        threads.append(threading.current_thread())
        release.wait()
        return [len(samples)] * len(samples)

    scorer = Scorer(reward_fn, tokenizer)
    jobs = [scorer.submit(ROLLOUTS), scorer.submit(ROLLOUTS[:1])]
    release.set()
    assert [[scored.score for scored in job.result()] for job in jobs] == [[2.0, 2.0], [1.0]]
    assert threads[0] is threads[1] is not threading.current_thread()
    assert threads[0].daemon


def test_the_thread_ends_with_its_scorer(tokenizer):
    scorer = Scorer(returning([1, 2]), tokenizer)
    scorer.score(ROLLOUTS)
    thread = scorer._thread
    assert thread.is_alive()
    del scorer
    thread.join(10)
    assert not thread.is_alive()


def test_reward_fn_has_a_tokenizer_of_its_own(tokenizer):
    def reward_fn(samples, tokenizer, **given):
        tokenizer.padding_side = "right"
        return [0.0] * len(samples)

    tokenizer.padding_side = "left"
    Scorer(reward_fn, tokenizer).score(ROLLOUTS)
    assert tokenizer.padding_side == "left"


def measured(returned):
    return Metric(returning(returned))(Arguments([Rollout([4], [6]), Rollout([5], [6])], char_tokenizer()))


def test_a_metric_is_a_number_per_sample_or_one_for_all():
    metrics = measured(
        {"length": torch.tensor([1, 2]), "share": np.float32(0.5), "valid": [True, False], "n": torch.tensor(3)}
    )
    assert metrics == {"length": [1.0, 2.0], "share": 0.5, "valid": [1.0, 0.0], "n": 3.0}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "metric_fn must return a dict"),
        ({"length": [1.0]}, "metric_fn's 'length' returned 1 entries for 2 samples"),
        ({"length": None}, "metric_fn's 'length' must return one entry per sample, got None"),
        ({"length": [1.0, "b"]}, "metric_fn's 'length' must be numbers, got 'b' for 'bc'"),
    ],
)
def test_a_wrong_metric_is_named(returned, message):
    with pytest.raises(RewardError, match=message):
        measured(returned)


def test_an_exception_of_metric_fn_is_reported_as_one_of_reward_fn_is():
    def metric_fn(**given):
        raise ZeroDivisionError("nothing")

    with pytest.raises(RewardError, match="metric_fn raised ZeroDivisionError: nothing; first sample: 'ac'"):
        Metric(metric_fn)(Arguments([Rollout([4], [6])], char_tokenizer()))
