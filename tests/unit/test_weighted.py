"""Rewards of several parts: dicts of results, lists of functions, weights, and functions that are async."""

import asyncio
import functools
import gc
import traceback
import warnings

import pytest

import trlx
from trlx.batch import Rollout
from trlx.rewards.calling import RewardError
from trlx.rewards.results import means
from trlx.rewards.scoring import Scorer

ROLLOUTS = [Rollout([4], [6, 2]), Rollout([4], [6, 7, 6])]


def judged(tokenizer, reward_fn):
    """([scores], [parts]) of two rollouts, "c" and "cdc"."""
    scored = Scorer(reward_fn, tokenizer).score(ROLLOUTS)
    return [one.score for one in scored], [one.parts for one in scored]


def lengths(outputs):
    return [len(output) for output in outputs]


def ends(outputs, ended, **kwargs):
    return [[0.5], [0.25]]


def test_the_parts_of_a_dict_are_summed_and_kept(tokenizer):
    scores, parts = judged(tokenizer, lambda outputs: {"helpful": [1, 2], "short": (-0.5, 0.25)})
    assert scores == [0.5, 2.25]
    assert parts == [{"helpful": 1.0, "short": -0.5}, {"helpful": 2.0, "short": 0.25}]


def test_dense_parts_add_up_token_by_token_and_scalars_stand_at_the_last_one(tokenizer):
    dense = {"a": [[1, 2], [3, 4]], "b": [10, [20]], "c": [[100], [200]]}
    scores, parts = judged(tokenizer, lambda outputs: dense)
    assert scores == [[1.0, 2.0 + 10 + 100], [3.0 + 20, 4.0, 200.0]]
    assert parts == [{"a": 3.0, "b": 10.0, "c": 100.0}, {"a": 7.0, "b": 20.0, "c": 200.0}]


def test_weights_count_in_the_score_and_not_in_its_parts(tokenizer):
    rewards = trlx.WeightedRewards({"long": (lengths, 2), "ends": (ends, -1.0), "watched": (lambda outputs: [7, 8], 0)})
    scores, parts = judged(tokenizer, rewards)
    assert scores == [2 * 1 - 0.5, 2 * 3 - 0.25]
    assert parts == [
        {"long": 1.0, "ends": 0.5, "watched": 7.0},
        {"long": 3.0, "ends": 0.25, "watched": 8.0},
    ]


def test_a_dict_within_weighted_rewards_has_names_within_names(tokenizer):
    rewards = trlx.WeightedRewards({"long": lengths, "judge": (lambda outputs: {"a": [1, 1], "b": [2, 2]}, 0.5)})
    assert judged(tokenizer, rewards) == (
        [1 + 1.5, 3 + 1.5],
        [{"long": 1.0, "judge/a": 1.0, "judge/b": 2.0}, {"long": 3.0, "judge/a": 1.0, "judge/b": 2.0}],
    )


class Judge:
    def __call__(self, outputs):
        return [1, 1]


@pytest.mark.parametrize("kind", [list, tuple, trlx.WeightedRewards])
def test_a_list_of_functions_is_a_sum_and_parts_are_called_as_functions_are(tokenizer, kind):
    functions = [lengths, Judge(), lambda outputs: [2, 2], functools.partial(lengths), (lengths, 0.5)]
    scores, parts = judged(tokenizer, kind(functions))
    assert scores == [1 + 1 + 2 + 1 + 0.5, 3 + 1 + 2 + 3 + 1.5]
    assert list(parts[0]) == ["lengths", "Judge", "reward_2", "partial", "lengths_4"]


def test_a_dict_of_functions_is_a_sum_of_parts_with_these_names(tokenizer):
    rewards = {"long": lengths, "half": (lengths, 0.5)}
    assert judged(tokenizer, rewards) == ([1.5, 4.5], [{"long": 1.0, "half": 1.0}, {"long": 3.0, "half": 3.0}])


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([], "no reward function in the list"),
        ({}, "no reward function in the list"),
        ([3], r"is a function, or \(function, weight\), got 3"),
        ({"a": (lengths, "1")}, "got .*'1'"),
        ({"a": (0.1, lengths)}, r"is a function, or \(function, weight\), got \(0.1, "),
        ({"a": (lengths, float("nan"))}, "nan"),
        ([trlx.WeightedRewards([lengths])], "WeightedRewards object"),
        ({"mean": (lengths, 1.0)}, "No part of a reward can be called 'mean': reward/mean is another number"),
    ],
)
def test_what_is_no_list_of_functions_is_refused(rewards, words):
    with pytest.raises((TypeError, ValueError), match=words) as refused:
        trlx.WeightedRewards(rewards)
    assert {entry.filename for entry in traceback.extract_tb(refused.value.__traceback__)} == {__file__}


def test_a_part_that_fails_or_asks_in_vain_is_named(tokenizer):
    rewards = trlx.WeightedRewards({"long": (lengths, 1), "bad": (lambda outputs, label: 1 / 0, 1)})
    scorer = Scorer(rewards, tokenizer)
    with pytest.raises(ValueError, match="reward_fn's 'bad' asks for 'label'"):
        scorer.check([])
    scorer.check(["label"])
    with pytest.raises(RewardError, match="reward_fn's 'bad' raised ZeroDivisionError"):
        judged(tokenizer, trlx.WeightedRewards({"long": lengths, "bad": lambda outputs: 1 / 0}))


def test_a_function_may_be_async(tokenizer):
    async def reward(outputs):
        await asyncio.sleep(0)
        return {"long": [len(output) for output in outputs]}

    assert judged(tokenizer, reward) == ([1.0, 3.0], [{"long": 1.0}, {"long": 3.0}])


def test_async_functions_run_at_the_same_time_and_in_one_loop_for_the_whole_run(tokenizer):
    met, loops = asyncio.Event(), []

    async def first(outputs):
        loops.append(asyncio.get_running_loop())
        await asyncio.wait_for(met.wait(), 10)  # for ever, if the second came only after it
        return [1, 1]

    async def second(outputs):
        met.set()
        return [2, 2]

    def third(outputs):  # one that starts a loop of its own, as it must where nothing else is async
        return asyncio.run(second(outputs))

    scorer = Scorer([first, second, third], tokenizer)
    for _ in range(2):
        assert [one.score for one in scorer.score(ROLLOUTS)] == [5.0, 5.0]
        met.clear()
    assert loops[0] is loops[1]


def test_where_one_async_function_fails_the_others_are_given_up(tokenizer):
    given_up = []

    async def slow(outputs):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            given_up.append(True)
            raise

    async def bad(outputs):
        await asyncio.sleep(0)
        raise ConnectionError("judge is away")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RewardError, match="reward_fn's 'bad' raised ConnectionError: judge is away"):
            Scorer([slow, bad], tokenizer).score(ROLLOUTS)
        gc.collect()
    assert given_up == [True]


def test_means_are_over_those_that_have_the_part():
    assert means([{"a": 1.0, "b": 4.0}, {"a": 2.0}]) == {"a": 1.5, "b": 4.0}
    assert means([{}, {}]) == {}
