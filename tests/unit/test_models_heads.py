from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.tiny_models import FAMILIES, ragged_batch, tiny_model
from trlx.models.decoder import blocks, freeze, trunk
from trlx.models.heads import QHeads, ValueBranch, ValueHead
from trlx.models.policy import build_policy


def watched_states(model, branch) -> tuple[torch.Tensor, torch.Tensor]:
    with branch.watching():
        hidden = trunk(model)(ragged_batch()[0], use_cache=False)[0]
    return hidden, branch.states(hidden)


def test_an_untrained_value_is_zero_but_its_head_can_learn():
    head = ValueHead(4)
    states = torch.ones(3, 4)
    values = head(states)
    assert values.tolist() == [0, 0, 0]
    values.sum().backward()
    assert head.layers[-1].weight.grad.abs().sum() > 0


def test_values_are_float32_for_half_precision_states_and_under_autocast():
    head = ValueHead(4)
    nn.init.constant_(head.layers[-1].weight, 0.3)
    states = torch.full((2, 4), 0.1, dtype=torch.bfloat16)
    expected = head(states.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(states)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("k", [1, 3])
def test_a_value_branch_starts_with_the_hidden_states_of_the_policy(name, k):
    model = tiny_model(name)
    hidden, states = watched_states(model, ValueBranch(model, k).eval())
    torch.testing.assert_close(states, hidden, rtol=0, atol=1e-6)


def test_a_value_branch_trains_its_own_blocks_and_leaves_the_policy_alone():
    model = tiny_model("mistral")
    freeze(model, 0)
    policy = build_policy(model, num_layers_unfrozen=0, value_head=True, value_layers=2)
    branch = policy.heads["value"]
    nn.init.ones_(branch.head.layers[-1].weight)
    before = policy(*ragged_batch())
    before.values.square().sum().backward()
    assert all(weight.grad is not None for weight in branch.parameters())
    assert all(weight.grad is None for weight in model.parameters())
    torch.optim.SGD(branch.parameters(), lr=0.1).step()
    after = policy(*ragged_batch())
    assert torch.equal(after.logprobs, before.logprobs)
    assert not torch.equal(after.values, before.values)


def test_a_value_branch_sends_gradients_into_the_live_blocks_below_it():
    model = tiny_model("gpt2")
    branch = ValueBranch(model, 1)
    watched_states(model, branch)[1].square().sum().backward()
    assert blocks(model)[1].mlp.c_fc.weight.grad is not None
    assert blocks(model)[2].mlp.c_fc.weight.grad is None


def test_a_value_branch_does_not_own_the_live_blocks_and_leaves_no_hooks_behind():
    model = tiny_model("gpt2")
    branch = ValueBranch(model, 1)
    watched_states(model, branch)
    live = {id(weight) for weight in model.parameters()}
    assert not live & {id(weight) for weight in branch.parameters()}
    assert not any(block._forward_pre_hooks for block in [*blocks(model), *branch.blocks])


def test_a_value_branch_copies_frozen_blocks_as_trainable_ones():
    model = tiny_model("gpt2")
    freeze(model, 0)
    assert all(weight.requires_grad for weight in ValueBranch(model, 2).parameters())


@pytest.mark.parametrize("mode", [True, False])
def test_a_value_branch_is_checked_without_dropout_and_is_then_in_the_mode_of_its_model(mode):
    branch = ValueBranch(tiny_model(resid_pdrop=0.5).train(mode), 1)
    assert {module.training for module in branch.modules()} == {mode}


@pytest.mark.parametrize("k", [0, 4])
def test_a_value_branch_of_more_blocks_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"num_value_layers_unfrozen is {k}, but GPT2LMHeadModel has 3 blocks"):
        ValueBranch(tiny_model(), k)


def test_a_trunk_that_does_more_after_its_blocks_is_refused():
    model = tiny_model()
    trunk(model).register_forward_hook(lambda module, args, output: (output[0] * 2,))
    with pytest.raises(ValueError, match="GPT2LMHeadModel does more after its blocks than a norm"):
        ValueBranch(model, 1)


def test_q_targets_start_equal_stay_frozen_and_follow_by_polyak_averaging():
    torch.manual_seed(0)
    q = QHeads(hidden=4, vocab_size=5, num_heads=2)
    hidden, actions = torch.randn(3, 4), torch.tensor([0, 4, 2])
    values, targets, _ = q(hidden, actions)
    assert torch.equal(values, targets) and values.abs().min() > 0
    assert not any(weight.requires_grad for weight in q.targets.parameters())
    for weight in q.heads.parameters():
        nn.init.constant_(weight, 3.0)
    for weight in q.targets.parameters():
        nn.init.constant_(weight, 1.0)
    q.sync(0.25)
    assert {value for weight in q.targets.parameters() for value in weight.flatten().tolist()} == {1.5}


def test_q_scores_are_those_of_the_chosen_action():
    torch.manual_seed(0)
    q = QHeads(hidden=4, vocab_size=5, num_heads=2)
    hidden, actions = torch.randn(3, 4), torch.tensor([0, 4, 2])
    values, targets, logprobs = q(hidden, actions)
    for each in range(2):
        full = q.heads[each](hidden)
        torch.testing.assert_close(values[each], full[range(3), actions])
        torch.testing.assert_close(logprobs[each], full.log_softmax(-1)[range(3), actions])
        weights = list(q.heads[each].parameters())
        wanted = (full.square() + 3 * full.log_softmax(-1))[range(3), actions].sum()
        found = (values[each].square() + 3 * logprobs[each]).sum()
        for pair in zip(*(torch.autograd.grad(x, weights, retain_graph=True) for x in (wanted, found)), strict=True):
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
    assert values.requires_grad and logprobs.requires_grad and targets.shape == (2, 3)


def test_target_q_sends_no_gradient_into_the_policy():
    q = QHeads(hidden=4, vocab_size=5, num_heads=1)
    hidden = torch.ones(2, 4, requires_grad=True)
    assert not q(hidden, torch.tensor([0, 1]))[1].requires_grad
