"""The same loss of a reward model as TRL. TRL is the extra [bench]."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import finish, pack
from trlx.methods.reward import reward_loss

trl = pytest.importorskip("trl", reason="compares with TRL: pip install 'trlx[bench]'")


@pytest.mark.parametrize("center_coef", [None, 0.3])
@pytest.mark.parametrize("with_margin", [False, True])
def test_loss_and_gradient_are_trls(center_coef, with_margin):
    from trl import RewardTrainer

    rewards = torch.tensor([1.0, -0.5, 0.2, 0.7, -2.0, -1.0], requires_grad=True)
    margins = torch.tensor([0.5, 0.0, 1.5]) * with_margin
    # TRL's batch has all chosen answers first
    said = SimpleNamespace(logits=torch.cat([rewards[0::2], rewards[1::2]])[:, None])
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=center_coef),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(6, 3), **({"margin": margins} if with_margin else {})}
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: said, inputs)
    (wanted,) = torch.autograd.grad(theirs, rewards)
    scores = torch.zeros(6, 3)
    scores[0::2, 2] = margins
    batch = TokenBatch(torch.ones(6, 3).long(), scores == scores, torch.tensor([[False, True, True]] * 6), scores)
    summed, found = reward_loss(TokenOutputs(torch.zeros(6, 3), last=rewards), batch, center_coef or 0.0)
    (gradient,) = torch.autograd.grad(summed / 3, rewards)
    assert (summed / 3).item() == pytest.approx(theirs.item(), abs=1e-5)
    assert torch.allclose(gradient, wanted, atol=1e-5)
    numbers, logged = finish(*pack(found)), trainer._metrics["train"]
    names = {"accuracy": "accuracy", "margin": "margin", "mean_reward": "rewards/mean", "max_reward": "rewards/max"}
    assert {name: numbers[here] for name, here in names.items()} == pytest.approx(
        {name: logged[name][0] for name in names}, abs=1e-5
    )
