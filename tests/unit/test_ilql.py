from __future__ import annotations

import math

import pytest
import torch

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.ilql import ilql_loss, normalize_returns, polyak_, shifted_logits
from trlx.methods.masked import finish, pack

NAN = math.nan
SETTINGS = {"tau": 0.7, "gamma": 0.5, "cql_scale": 0.1, "awac_scale": 2.0, "beta": 1.0}


def two_rows() -> tuple[TokenOutputs, TokenBatch]:
    """A two-turn dialogue with a user token between its actions, and a row with one action; NaN where nobody may look.

    Row 0: V 1, 2; Q 2, 3 and 4, 1; target Q 3, 1 and 5, 0; score 4 at the end.
    Row 1: V 4; Q 1 and 2; target Q 4 and 6; score -1.
    """
    mask = torch.tensor([[False, True, False, True], [False, True, False, False]])
    row0, row1 = [NAN, 0.0, NAN, 4.0], [NAN, -1.0, NAN, NAN]
    batch = TokenBatch(torch.zeros(2, 4, dtype=torch.int64), torch.ones_like(mask), mask, torch.tensor([row0, row1]))

    def column(a, b, c):
        return torch.tensor([[NAN, a, NAN, b], [NAN, c, NAN, NAN]])

    scores = TokenOutputs(
        logprobs=column(-1.0, -2.0, -3.0),
        values=column(1.0, 2.0, 4.0),
        q=torch.stack([column(2.0, 3.0, 1.0), column(4.0, 1.0, 2.0)]),
        target_q=torch.stack([column(3.0, 1.0, 4.0), column(5.0, 0.0, 6.0)]),
        q_logprobs=torch.stack([column(-1.0, -1.0, -2.0), column(-3.0, -1.0, -2.0)]),
    )
    return scores, batch


def test_the_four_losses_by_hand():
    loss, metrics = ilql_loss(*two_rows(), **SETTINGS)
    numbers = finish(*pack(metrics))
    # wanted Q: 0 + 0.5 * V(next action) 2 = 1; 4 at the end; -1 at the end of row 1
    loss_q = (1 + 9) + (1 + 9) + (4 + 9)
    # min target Q less V: 3 - 1 (tau), 0 - 2 (1 - tau), 4 - 4
    loss_v = 0.7 * 4 + 0.3 * 4
    loss_cql = 4 + 2 + 4
    loss_awac = 1 * math.exp(2) + 2 * math.exp(-2) + 3
    assert numbers["losses/loss_q"] == pytest.approx(loss_q / 3, abs=1e-5)
    assert numbers["losses/loss_v"] == pytest.approx(loss_v / 3, abs=1e-5)
    assert numbers["losses/loss_cql"] == pytest.approx(loss_cql / 3, abs=1e-5)
    assert numbers["losses/loss_awac"] == pytest.approx(loss_awac / 3, abs=1e-5)
    assert loss.item() == pytest.approx(loss_q + loss_v + 0.1 * loss_cql + 2 * loss_awac, abs=1e-4)
    assert numbers["losses/loss"] == pytest.approx(loss.item() / 3, abs=1e-5)


def test_ilql_spreads_by_hand():
    numbers = finish(*pack(ilql_loss(*two_rows(), **SETTINGS)[1]))
    assert (numbers["values/mean"], numbers["values/max"]) == pytest.approx((7 / 3, 4))
    assert (numbers["qvalues/0/mean"], numbers["qvalues/1/min"]) == pytest.approx((2, 1))
    assert numbers["awac_weight/max"] == pytest.approx(math.exp(2), abs=1e-5)


def test_each_head_learns_from_its_own_loss_only():
    scores, batch = two_rows()
    tensors = [scores.logprobs, scores.values, scores.q, scores.target_q, scores.q_logprobs]
    for tensor in tensors:
        tensor.requires_grad_()
    ilql_loss(scores, batch, **SETTINGS)[0].backward()
    mask = batch.response_mask
    # V only from the expectile: -2 * weight * (target Q - V)
    assert scores.values.grad[mask].tolist() == pytest.approx([-2.8, 1.2, 0], abs=1e-5)
    assert scores.q.grad[:, mask].tolist() == [pytest.approx([2, -2, 4]), pytest.approx([6, -6, 6])]
    assert scores.logprobs.grad[mask].tolist() == pytest.approx([-2 * math.exp(2), -2 * math.exp(-2), -2], abs=1e-4)
    assert scores.q_logprobs.grad[:, mask].tolist() == [pytest.approx([-0.1] * 3)] * 2
    assert scores.target_q.grad is None
    assert all(tensor.grad[..., ~mask].eq(0).all() for tensor in tensors if tensor.grad is not None)


def test_one_head_is_enough():
    scores, batch = two_rows()
    one = TokenOutputs(scores.logprobs, scores.values, scores.q[:1], scores.target_q[:1], scores.q_logprobs[:1])
    numbers = finish(*pack(ilql_loss(one, batch, **SETTINGS)[1]))
    assert numbers["losses/loss_q"] == pytest.approx((1 + 1 + 4) / 3, abs=1e-5)
    assert "qvalues/0/mean" in numbers and "qvalues/1/mean" not in numbers


def test_a_batch_without_actions_costs_nothing():
    scores, batch = two_rows()
    batch.response_mask = torch.zeros_like(batch.response_mask)
    loss, metrics = ilql_loss(scores, batch, **SETTINGS)
    assert loss.item() == 0 and finish(*pack(metrics)) == {}


def test_the_target_moves_by_alpha_and_a_step_of_one_copies():
    target, source = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for parameter, number in zip([*target.parameters(), *source.parameters()], [0.0, 8.0, 4.0, 0.1], strict=True):
        torch.nn.init.constant_(parameter, number)
    polyak_(target, source, 0.25)
    assert (target.weight.item(), target.bias.item()) == pytest.approx((1, 6.025))
    polyak_(target, source, 1.0)
    assert torch.equal(target.bias, source.bias) and source.weight.item() == 4


def test_returns_are_normalized_over_the_whole_set():
    assert normalize_returns([1.0, 2.0, 6.0]) == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5])


def test_equal_returns_become_zero_however_their_mean_rounds():
    assert normalize_returns([100.1] * 3) == [0, 0, 0]
    assert normalize_returns([5.0]) == [0]
    assert normalize_returns([]) == []


def test_sampling_is_shifted_by_the_advantage_of_each_token():
    logits, q = torch.tensor([[3.0, 3.0]]), torch.tensor([[1.0, 4.0]])
    shifted = shifted_logits(logits, q, v=torch.tensor([2.0]), beta=0.5)
    assert shifted.tolist() == [pytest.approx([-math.log(2) - 0.5, -math.log(2) + 1])]
