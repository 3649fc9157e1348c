from __future__ import annotations

import math

import pytest
import torch

from trlx.methods.masked import (
    RunningMoments,
    finish,
    histogram_of,
    mean_of,
    means_of,
    merge_packed,
    pack,
    spread_of,
    whiten,
)

X = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -7.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])  # chooses 1, 2, 6: mean 3, squares about it 4 + 1 + 9


def test_a_pair_is_reported_as_its_quotient_and_a_spread_as_four_numbers():
    numbers = finish(*pack({"loss": mean_of(X, MASK), "values": spread_of(X, MASK)}))
    assert numbers == pytest.approx(
        {"loss": 3, "values/mean": 3, "values/std": math.sqrt(7), "values/min": 1, "values/max": 6}
    )


def test_pieces_of_any_size_merge_into_the_numbers_of_the_whole():
    pieces = [[4.0], [1.0, 2.0, 6.0], []]
    packed = [pack({"m": mean_of(torch.tensor(p)), "s": spread_of(torch.tensor(p))}) for p in pieces]
    numbers = finish(packed[0][0], merge_packed(torch.stack([rows for _, rows in packed])))
    # 4, 1, 2, 6: mean 13/4, sum of squares 57, variance (57 - 169/4) / 3
    wanted = {"m": 3.25, "s/mean": 3.25, "s/std": math.sqrt(14.75 / 3), "s/min": 1, "s/max": 6}
    assert numbers == pytest.approx(wanted)


def test_what_was_counted_nowhere_is_left_out_without_a_nan():
    nowhere = torch.zeros_like(MASK)
    names, packed = pack({"m": mean_of(X, nowhere), "s": spread_of(X, nowhere)})
    assert packed.tolist() == [[0, 0, 0, math.inf, -math.inf]] * 2
    assert finish(names, packed) == {}


def test_a_loss_function_without_metrics_reports_nothing():
    names, packed = pack({})
    assert finish(names, merge_packed(torch.stack([packed, packed]))) == {}


def test_a_single_entry_has_a_spread_of_zero():
    assert finish(*pack({"s": spread_of(torch.tensor([5.0]))})) == {"s/mean": 5, "s/std": 0, "s/min": 5, "s/max": 5}


def test_a_nan_among_the_counted_entries_is_reported_and_not_hidden():
    numbers = finish(*pack({"s": spread_of(torch.tensor([1.0, math.nan]))}))
    assert set(numbers) == {"s/mean", "s/std", "s/min", "s/max"} and all(map(math.isnan, numbers.values()))


def test_a_spread_far_from_zero_keeps_its_std():
    numbers = finish(*pack({"s": spread_of(torch.tensor([10000.0, 10001.0, 10002.0]))}))
    assert numbers["s/std"] == pytest.approx(1, abs=1e-5)


def test_many_means_at_once_equal_one_by_one_and_count_booleans_as_ones():
    x = torch.tensor([1.0, 2.0, 6.0])
    together = finish(*pack(means_of({"x": x, "large": x > 1})))
    assert together == pytest.approx({"x": 3, "large": 2 / 3})
    assert together == finish(*pack({"x": mean_of(x), "large": mean_of(x > 1)}))


def test_metrics_carry_no_gradient():
    x = torch.ones(2, requires_grad=True)
    tensors = [*mean_of(x), *spread_of(x), *means_of({"x": x})["x"], pack({"x": (x.sum(), x.sum())})[1]]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_whitening_sees_chosen_entries_only_and_zeroes_the_others():
    std = math.sqrt(14 / 3)  # population variance of 1, 2, 6
    wanted = torch.tensor([[-2 / std, -1 / std, 0], [3 / std, 0, 0]])
    assert torch.allclose(whiten(X, MASK), wanted, atol=1e-6)


def test_whitening_one_entry_equal_entries_or_none_gives_zeros():
    one = torch.tensor([[True, False, False], [False, False, False]])
    assert whiten(X, one).tolist() == [[0] * 3] * 2
    assert whiten(X, torch.zeros_like(one)).tolist() == [[0] * 3] * 2
    assert whiten(torch.full((2, 3), 0.1), MASK).abs().max() < 1e-5


def test_rounding_in_the_variance_of_large_equal_entries_gives_no_nan():
    x = torch.full((10, 100), 33333.3)  # its mean square less its squared mean is -2e-7 in float64
    assert whiten(x, torch.ones_like(x, dtype=torch.bool)).abs().max() < 1e-5


def test_a_histogram_counts_every_finite_number_in_equal_parts_of_their_range():
    x = torch.tensor([[0.0, 0.9, 1.0, 4.0], [3.9, 2.0, math.nan, math.inf]])
    assert histogram_of(x, bins=4) == {"low": 0.0, "high": 4.0, "counts": [2, 1, 1, 2]}
    assert histogram_of(torch.full((3,), 7.0)) == {"low": 7.0, "high": 7.0, "counts": [3]}
    assert histogram_of(torch.zeros(0)) == {"low": 0.0, "high": 0.0, "counts": [0]}


def test_running_moments_of_batches_are_the_moments_of_all_numbers():
    moments = RunningMoments()
    assert moments.update([1.0, 3.0]) == pytest.approx((2, math.sqrt(2)))
    assert moments.update(torch.tensor([[2.0, 10.0]])) == pytest.approx((6, math.sqrt(32)))
    # 1, 3, 2, 10: mean 4, squares about it 9 + 1 + 4 + 36
    assert (moments.mean, moments.count, moments.std) == pytest.approx((4, 4, math.sqrt(50 / 3)))


def test_one_number_has_no_std():
    moments = RunningMoments()
    assert moments.std == 0
    assert moments.update([5.0]) == (5, 0) and moments.std == 0


def test_loaded_moments_go_on_as_if_never_stopped():
    first, second = RunningMoments(), RunningMoments()
    first.update([1.0, 3.0])
    second.load_state_dict(first.state_dict())
    first.update([10.0]), second.update([10.0])
    assert first == second and first.count == 3
