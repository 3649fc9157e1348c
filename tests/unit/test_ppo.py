from __future__ import annotations

import math

import pytest
import torch

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.advantages import (
    AdaptiveKL,
    FixedKL,
    ScoreScale,
    gae,
    kl_penalty,
    missing_eos_penalty,
    token_rewards,
)
from trlx.methods.masked import finish, pack
from trlx.methods.ppo import ppo_loss

NAN = math.nan


def same(tensor, wanted) -> bool:
    return torch.allclose(tensor, torch.tensor(wanted, dtype=tensor.dtype), atol=1e-5)


def test_advantages_follow_the_recursion():
    rewards, values, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[True, True]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # d1 = 2 - 4 = -2; d0 = 1 + 0.5 * 4 - 3 = 0; A0 = 0 + 0.25 * -2
    assert same(advantages, [[-0.5, -2]]) and same(returns, [[2.5, 2]])


def test_masked_tokens_are_stepped_over_and_never_read():
    mask = torch.tensor([[False, True, False, True, False], [False, False, False, True, True]])
    rewards = torch.tensor([[NAN, 1, NAN, 2, NAN], [NAN, NAN, NAN, 1, 2]])
    values = torch.tensor([[NAN, 3, NAN, 4, NAN], [NAN, NAN, NAN, 3, 4]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert same(advantages, [[0, -0.5, 0, -2, 0], [0, 0, 0, -0.5, -2]])
    assert same(returns, [[0, 2.5, 0, 2, 0], [0, 0, 0, 2.5, 2]])


def test_with_lambda_one_returns_are_the_discounted_rewards_to_go():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=generator)
    _, returns = gae(rewards, values, torch.ones(3, 6, dtype=torch.bool), gamma=0.9, lam=1.0)
    for t in range(6):
        discount = 0.9 ** torch.arange(6 - t)
        assert torch.allclose(returns[:, t], (rewards[:, t:] * discount).sum(dim=1), atol=1e-5)


def test_kl_estimators_by_hand():
    # policy 1/2, reference 1/4 and 1: r = 1/2 and 2
    logprobs, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 1.0]).log()
    ln2 = math.log(2)
    assert same(kl_penalty(logprobs, ref, "k1"), [ln2, -ln2])
    assert same(kl_penalty(logprobs, ref, "k2"), [ln2**2 / 2, ln2**2 / 2])
    assert same(kl_penalty(logprobs, ref, "k3"), [-0.5 + ln2, 1 - ln2])
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_penalty(logprobs, ref, "k4")


def test_k1_and_k3_have_the_true_kl_as_their_expectation():
    policy, ref = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    kl = (policy * (policy / ref).log()).sum().item()
    for estimator in ("k1", "k3"):
        assert (policy * kl_penalty(policy.log(), ref.log(), estimator)).sum().item() == pytest.approx(kl, abs=1e-6)


def test_a_token_reward_is_its_score_less_the_penalty_and_zero_outside_the_response():
    scores, mask = torch.tensor([[9.0, 0.0, 5.0, NAN]]), torch.tensor([[False, True, True, False]])
    logprobs, ref = torch.tensor([[-7.0, -1.0, -2.0, NAN]]), torch.tensor([[-1.0, -3.0, -1.0, NAN]])
    assert same(token_rewards(scores, logprobs, ref, mask, 0.5), [[0, -1, 5.5, 0]])
    assert same(token_rewards(scores, logprobs, ref, mask, 0.5, "k2"), [[0, -1, 4.75, 0]])


def test_scores_are_clipped_and_divided_where_that_is_asked_for():
    scores = torch.tensor([[-30.0], [4.0], [30.0]])
    assert same(ScoreScale(limit=10.0)(scores)[0], [[-10], [4], [10]])
    assert same(ScoreScale("ref", ref_std=2.0)(scores)[0], [[-15], [2], [15]])
    for nothing in (None, 0.0):
        assert same(ScoreScale(None, nothing)(scores)[0], scores.tolist())


def test_only_a_response_that_does_not_end_pays_and_at_its_last_token():
    eos = 0
    tokens = torch.tensor([[5, 3, 0, 0], [5, 0, 3, 0], [0, 3, 7, 8], [5, 5, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    scores = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).float()
    wanted = [[0, 0, 1, 0], [0, 0, -1, 0], [0, 0, 0, -1], [0, 0, 0, 0]]
    assert same(missing_eos_penalty(scores, tokens, mask, [eos], 2.0), wanted)
    assert same(missing_eos_penalty(scores, tokens, mask, tokens.unique().tolist(), 2.0), scores.tolist())


def test_a_fixed_coefficient_stays():
    kl = FixedKL(0.1)
    kl.update(kl=50.0, n=100)
    assert kl.coef == 0.1


def test_an_adaptive_coefficient_moves_towards_its_target_by_clipped_steps():
    kl = AdaptiveKL(0.5, target=10.0, horizon=100)
    kl.update(kl=11.0, n=50)
    assert kl.coef == pytest.approx(0.5 * 1.05)
    kl.update(kl=1000.0, n=50)
    assert kl.coef == pytest.approx(0.5 * 1.05 * 1.1)
    kl.update(kl=0.0, n=50)
    assert kl.coef == pytest.approx(0.5 * 1.05 * 1.1 * 0.9)


def test_a_loaded_coefficient_is_the_saved_one():
    saved, loaded = AdaptiveKL(0.7, target=10.0, horizon=100), AdaptiveKL(0.5, target=10.0, horizon=100)
    loaded.load_state_dict(saved.state_dict())
    assert loaded == saved


def ppo_batch(ratios, advantages, old_values, returns) -> tuple[TokenBatch, torch.Tensor]:
    """One row: a prompt token, a token per ratio, a padding token full of NaN; and its current log-probabilities."""

    def row(numbers):
        return torch.tensor([[NAN, *numbers, NAN]])

    length = len(ratios)
    batch = TokenBatch(
        tokens=torch.zeros(1, length + 2, dtype=torch.int64),
        attention_mask=torch.tensor([[True] * (length + 1) + [False]]),
        response_mask=torch.tensor([[False] + [True] * length + [False]]),
        scores=torch.zeros(1, length + 2),
        old_logprobs=row([-1.0] * length),
        old_values=row(old_values),
        advantages=row(advantages),
        returns=row(returns),
    )
    logprobs = row([-1 + math.log(ratio) for ratio in ratios])
    return batch, logprobs


def loss_by_hand(dual_clip=None):
    batch, logprobs = ppo_batch(
        [1.5, 0.5, 5.0, 1.1], [1.0, -1.0, -1.0, 2.0], [0.0, 0.0, 1.0, 1.0], [1.0, 2.0, 1.0, -1.0]
    )
    logprobs.requires_grad_()
    values = torch.tensor([[NAN, 0.5, -0.1, 1.5, 1.4, NAN]], requires_grad=True)
    scores = TokenOutputs(logprobs=logprobs, values=values)
    loss, metrics = ppo_loss(scores, batch, 0.2, 0.2, vf_coef=0.5, dual_clip=dual_clip)
    loss.backward()
    return loss.item(), finish(*pack(metrics)), logprobs.grad, values.grad


def test_the_ppo_loss_is_a_sum_of_clipped_terms_over_response_tokens():
    loss, numbers, logprob_grad, value_grad = loss_by_hand()
    # policy: -1.2 clipped, +0.8 clipped, +5 not, -2.2 not
    # value: (0.2-1)^2 clipped over 0.5^2; 2.1^2 both; (1.5-1)^2 over 0.2^2; 2.4^2 over 2.2^2; halved
    policy, value = -1.2 + 0.8 + 5 - 2.2, (0.64 + 4.41 + 0.25 + 5.76) / 2
    assert loss == pytest.approx(policy + 0.5 * value, abs=1e-5)
    assert numbers["losses/policy_loss"] == pytest.approx(policy / 4, abs=1e-6)
    assert numbers["losses/value_loss"] == pytest.approx(value / 4, abs=1e-6)
    assert numbers["losses/total_loss"] == pytest.approx(loss / 4, abs=1e-6)
    assert same(logprob_grad, [[0, 0, 0, 5, -2.2, 0]])
    assert same(value_grad, [[0, 0, -1.05, 0.25, 1.2, 0]])


def test_ppo_metrics_by_hand():
    _, numbers, _, _ = loss_by_hand()
    ratios = [1.5, 0.5, 5.0, 1.1]
    assert numbers["ratio"] == pytest.approx(8.1 / 4, abs=1e-6)
    assert numbers["policy/ratio_deviation/max"] == pytest.approx(4, abs=1e-5)
    assert numbers["policy/approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 4, abs=1e-6)
    assert numbers["policy/clipfrac"] == 0.5
    assert numbers["values/clipfrac"] == 0.25
    assert numbers["values/values_error"] == pytest.approx((0.25 + 4.41 + 0.25 + 5.76) / 4, abs=1e-6)
    relative = 0.5 / 1.01 + 2.1 / 2.01 + 0.5 / 1.01 + 2.4 / 0.99
    assert numbers["values/values_mape_error"] == pytest.approx(relative / 4, abs=1e-6)
    assert (numbers["values/mean"], numbers["values/max"]) == pytest.approx((3.3 / 4, 1.5))
    assert (numbers["old_values/mean"], numbers["returns/min"]) == pytest.approx((0.5, -1))
    assert numbers["padding_percentage"] == pytest.approx(1 / 6)


def test_the_clipped_share_has_a_part_for_each_sign_of_the_advantage():
    batch, logprobs = ppo_batch([1.5, 0.5, 0.5, 0.5], [1.0, -1.0, -1.0, 1.0], [0.0] * 4, [0.0] * 4)
    _, metrics = ppo_loss(TokenOutputs(logprobs, batch.old_values), batch, 0.2, 0.2, vf_coef=1.0)
    numbers = finish(*pack(metrics))
    assert [numbers[f"policy/clipfrac{part}"] for part in ("", "_low", "_high")] == [0.75, 0.5, 0.25]


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    loss, numbers, logprob_grad, _ = loss_by_hand(dual_clip=3.0)
    assert numbers["losses/policy_loss"] == pytest.approx((-1.2 + 0.8 + 3 - 2.2) / 4, abs=1e-6)
    assert same(logprob_grad, [[0, 0, 0, 0, -2.2, 0]])


def test_dual_clip_leaves_a_good_token_alone_where_its_loss_is_below_the_bound():
    batch, logprobs = ppo_batch([1.0], [2.0], [0.0], [0.0])
    loss, _ = ppo_loss(TokenOutputs(logprobs=logprobs, values=batch.old_values), batch, 0.2, 0.2, 1.0, dual_clip=3.0)
    assert loss.item() == pytest.approx(-2)


def test_the_first_update_has_ratio_one_and_no_divergence():
    batch, _ = ppo_batch([1.0, 1.0], [1.0, -1.0], [0.5, 0.5], [1.0, 1.0])
    numbers = finish(*pack(ppo_loss(TokenOutputs(batch.old_logprobs, batch.old_values), batch, 0.2, 0.2, 1.0)[1]))
    assert numbers["ratio"] == 1 and numbers["policy/ratio_deviation/max"] == 0 and numbers["policy/approx_kl"] == 0


def test_a_batch_without_response_tokens_costs_nothing():
    batch, logprobs = ppo_batch([], [], [], [])
    loss, metrics = ppo_loss(TokenOutputs(logprobs.requires_grad_(), logprobs), batch, 0.2, 0.2, 1.0)
    loss.backward()
    assert loss.item() == 0 and logprobs.grad.tolist() == [[0, 0]]
    assert finish(*pack(metrics)) == {"padding_percentage": 0.5}
