from __future__ import annotations

import pytest

from trlx.methods.rft import percentile_at, select, thresholds


def test_each_prompt_has_the_quantile_of_its_own_scores():
    prompts = ["a"] * 3 + ["b"] * 2 + ["c"] * 2
    scores = [0.0, 1.0, 4.0, 20.0, 30.0, -1.0, -5.0]
    # at 0.75: a halfway between 1 and 4; b 27.5, the highest; c -2, the lowest
    assert thresholds(prompts, scores, 0.75) == pytest.approx({"a": 2.5, "b": 27.499, "c": -1.999})


def test_samples_at_or_above_their_prompts_threshold_are_kept_in_order():
    prompts = ["b", "a", "a", "b", "a", "c"]
    outputs = ["p", "q", "r", "s", "t", "u"]
    scores = [9.0, 1.0, 2.0, 8.0, 3.0, -9.0]
    # medians: a 2, b 8.5, c -9, which is lifted by 0.001 and so beyond what c has
    assert select(prompts, outputs, scores, 0.5) == [0, 2, 4]


def test_a_repeated_sample_is_kept_once_but_two_prompts_may_share_an_output():
    prompts, outputs, scores = ["a", "a", "a", "b"], ["x", "x", "y", "x"], [1.0, 1.0, 0.0, 5.0]
    # medians: a 1, b 5, and c -1, lifted by 0.001 because it is the lowest
    assert select([*prompts, "c"], [*outputs, "z"], [*scores, -1.0], 0.5) == [0, 3]


def test_prompts_stuck_at_the_highest_level_keep_it_and_those_at_the_lowest_give_nothing():
    prompts, outputs, scores = ["a", "a", "b", "b"], ["p", "q", "r", "s"], [1.0, 1.0, 0.0, 0.0]
    assert select(prompts, outputs, scores, 0.7) == [0, 1]


def test_a_single_prompt_keeps_its_best():
    assert select(["a"] * 3, ["x", "y", "z"], [0.0, 1.0, 1.0], 0.9) == [1, 2]


def test_nothing_is_selected_from_nothing():
    assert select([], [], [], 0.5) == []


def test_prompts_may_be_token_ids():
    assert select([(1, 2)] * 2, [(3,), (4,)], [0.0, 1.0], 0.9) == [1]


def test_the_percentile_rises_by_equal_steps_and_starts_anew():
    assert [percentile_at(step, 0.6, 1.0, 4) for step in range(6)] == pytest.approx([0.6, 0.7, 0.8, 0.9, 0.6, 0.7])
