from __future__ import annotations

import pytest
import torch

from tests.unit.tiny_models import FAMILIES, ragged_batch, tiny_model
from trlx.models.policy import Policy, build_policy
from trlx.models.reference import Reference, digest


def train_a_step(policy: Policy) -> None:
    optimizer = torch.optim.SGD([weight for weight in policy.parameters() if weight.requires_grad], lr=0.5)
    scores = policy(*ragged_batch())
    (scores.logprobs.sum() + (scores.values - 1).square().sum()).backward()
    optimizer.step()


def scores_of(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        scores = policy(*ragged_batch())
    return scores.logprobs, scores.values


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("k", [-1, 0, 2])
def test_the_reference_is_the_first_policy_bit_for_bit_after_training(name, k):
    policy = build_policy(tiny_model(name), num_layers_unfrozen=k, value_head=True)
    first, _ = scores_of(policy)
    reference = Reference(policy)
    train_a_step(policy)
    trained, trained_values = scores_of(policy)
    assert torch.equal(trained, first) == (k == 0)
    with reference.active():
        assert torch.equal(scores_of(policy)[0], first)
    assert torch.equal(scores_of(policy)[0], trained)
    assert torch.equal(scores_of(policy)[1], trained_values)


def test_the_policy_comes_back_after_an_exception():
    policy = build_policy(tiny_model())
    reference = Reference(policy)
    with torch.no_grad():
        policy.model.lm_head.weight.add_(1)
    trained = policy.model.lm_head.weight.clone()
    with pytest.raises(KeyError), reference.active():
        raise KeyError
    assert torch.equal(policy.model.lm_head.weight, trained)


def test_training_goes_on_where_it_was_after_the_reference_spoke():
    weights = []
    for speaks in (False, True):
        policy = build_policy(tiny_model(), value_head=True)
        reference = Reference(policy)
        train_a_step(policy)
        if speaks:
            with reference.active():
                scores_of(policy)
        train_a_step(policy)
        weights.append(policy.model.lm_head.weight)
    assert torch.equal(*weights)


def test_the_reference_cannot_be_entered_twice():
    reference = Reference(build_policy(tiny_model()))
    with reference.active(), pytest.raises(RuntimeError, match="already active"), reference.active():
        pass
    with reference.active():
        pass


def test_the_digest_follows_the_language_model_and_not_its_heads():
    policy = build_policy(tiny_model(), num_layers_unfrozen=1, value_head=True)
    reference, first = Reference(policy), digest(policy)
    torch.nn.init.ones_(policy.heads["value"].layers[0].weight)
    assert digest(policy) == first
    train_a_step(policy)
    assert digest(policy) != first
    with reference.active():
        assert digest(policy) == first


def test_the_digest_depends_on_the_weights_but_not_on_what_is_frozen():
    policies = [build_policy(tiny_model(seed=seed), num_layers_unfrozen=k) for seed, k in [(0, -1), (0, 0), (1, 0)]]
    digests = [digest(policy) for policy in policies]
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_sees_one_changed_bit_and_two_exchanged_rows():
    def digest_after(change):
        model = tiny_model("llama")
        with torch.no_grad():
            change(model.model.embed_tokens.weight)
        return digest(build_policy(model))

    first = digest_after(lambda weight: None)
    assert digest_after(lambda weight: weight[5, 3].copy_(torch.nextafter(weight[5, 3], torch.tensor(9.0)))) != first
    assert digest_after(lambda weight: weight.copy_(weight.flip(0))) != first


def test_the_digest_reads_half_precision_weights():
    digests = [digest(build_policy(tiny_model("gptj", seed=seed).to(torch.bfloat16))) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
