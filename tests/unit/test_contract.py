"""A trainer class, an advantage or a loss of one's own that is wrong fails with a sentence."""

import pytest
import torch

import trlx
from tests.runs import share_of_a, tiny_config
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.methods.masked import mean_of
from trlx.methods.sft import sft_loss
from trlx.registry import register_trainer
from trlx.trainer.accelerate import AcceleratePPOTrainer, AccelerateSFTTrainer
from trlx.trainer.contract import check_collection, checked_loss
from trlx.trainer.ppo import PPOTrainer


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"state_dict": lambda self: {}}, "Own overrides only one of state_dict and load_state_dict"),
        ({"load_state_dict": lambda self, state: None}, "Own overrides only one of state_dict and load_state_dict"),
        ({"needs": staticmethod(lambda method: {"reference": True})}, "Own.needs must return a ModelNeeds, got {"),
        ({"unit": "token"}, "Own.unit must be Unit.TOKEN, Unit.SEQUENCE or Unit.PAIR, got 'token'"),
        ({"passes_per_epoch": 0}, "Own.passes_per_epoch must be a whole number of at least 1, got 0"),
        ({"samples_per_prompt": 2.0}, "Own.samples_per_prompt must be a whole number of at least 1, got 2.0"),
        ({"samples_per_prompt": lambda self: 2}, "Own.samples_per_prompt must be a whole number"),
        ({"rows_together": 0}, "Own.rows_together must be a whole number"),
    ],
)
def test_members_of_a_class_are_checked_before_the_model_is_loaded(tmp_path, members, words):
    own = type("Own", (AcceleratePPOTrainer,), members)
    config = tiny_config(tmp_path, "PPO", model={"model_path": "nowhere/at-all"})
    with pytest.raises(TypeError, match=words):
        own(config, share_of_a)


def test_a_class_with_both_halves_of_its_state_is_taken_and_one_without_a_backend_is_not(tmp_path):
    members = {"state_dict": lambda self: {}, "load_state_dict": lambda self, state: None}
    type("Own", (AcceleratePPOTrainer,), members)(tiny_config(tmp_path, "PPO"), share_of_a)
    with pytest.raises(TypeError, match="PPOTrainer has no backend: write backend_class = AccelerateBackend in it"):
        PPOTrainer(tiny_config(tmp_path, "PPO"), share_of_a)


def test_make_experience_gives_whole_blocks_of_rollouts(tmp_path):
    class Own(AccelerateSFTTrainer):
        given = None
        rows_together = 2

        def make_experience(self, samples, seq_length):
            if self.given is not None:
                self.learn_from(self.given)

    register_trainer("OwnSFT")(Own)
    config = tiny_config(tmp_path, "SFT", train={"trainer": "OwnSFT"})
    row = Rollout([4], [5])
    for given, words in (
        (None, "Own.make_experience must call self.learn_from"),
        (["ab"], r"Own.learn_from takes a list of trlx.batch.Rollout, got \['ab'\]"),
        ([row, row, row], "Own.learn_from got 3 rollouts: give a multiple of 2"),
        ([], "Own.learn_from got 0 rollouts"),
    ):
        Own.given = given
        with pytest.raises((TypeError, ValueError), match=words):
            trlx.train(samples=["ab"], config=config)


def batch_of(**columns):
    mask = torch.tensor([[False, True, True], [False, True, False]])
    return TokenBatch(torch.ones(2, 3).long(), mask | True, mask, torch.zeros(2, 3), **columns)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (None, "Own.advantages must return a TokenBatch, got NoneType"),
        (batch_of(advantages=torch.zeros(2)), r"Own.advantages gave advantages the shape \[2\]: it must be \[2, 3\]"),
        (batch_of(advantages=torch.zeros(2, 1)), r"gave advantages the shape \[2, 1\]"),
        (batch_of().rows([0]), r"gave tokens the shape \[1, 3\]"),
        (batch_of(returns=torch.full((2, 3), float("nan"))), "gave returns numbers that are not finite"),
    ],
)
def test_advantages_of_another_shape_or_not_finite_are_refused(after, words):
    with pytest.raises((TypeError, ValueError), match=words):
        check_collection("Own", batch_of(), after)


def test_advantages_that_fit_are_taken():
    after = batch_of(advantages=torch.zeros(2, 3), group=torch.tensor([0, 0]))
    assert check_collection("Own", batch_of(), after) is after


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda outputs, batch: None, r"Own.loss must return \(loss, metrics\), a tensor and a dict, got NoneType"),
        (lambda outputs, batch: outputs.logprobs.sum(), "Own.loss must return .* got Tensor"),
        (
            lambda outputs, batch: (outputs.logprobs, {}),
            "Own.loss must return a tensor of no dimensions with a gradient",
        ),
        (lambda outputs, batch: (outputs.logprobs.detach().sum(), {}), "of no dimensions with a gradient"),
        (
            lambda outputs, batch: (outputs.logprobs.sum(), {"x": 1.0}),
            "Own.loss gave the metric 'x' as 1.0: use mean_of",
        ),
        (lambda outputs, batch: (outputs.logprobs - batch.ref_logprobs, {}), "Own.loss reads a column that is None"),
        (lambda outputs, batch: (outputs.logprobs.mean(), {}), "Own.loss returns a mean, but must return a sum"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused_at_the_first_step(loss, words):
    outputs = TokenOutputs(torch.tensor([[0.0, -1, -2], [0, -3, 0]]).requires_grad_())
    with pytest.raises((TypeError, ValueError), match=words):
        checked_loss("Own", loss, outputs, batch_of())


def test_a_sum_is_taken_also_where_it_is_made_group_by_group():
    outputs = TokenOutputs(torch.tensor([[0.0, -1, -2], [0, -3, 0]]).requires_grad_())
    assert checked_loss("Own", sft_loss, outputs, batch_of())[0].item() == 6

    def of_groups(outputs, batch):
        means = [outputs.logprobs[batch.group == group].mean() for group in batch.group.unique()]
        return sum(means), {"mean": mean_of(torch.stack(means))}

    assert checked_loss("Own", of_groups, outputs, batch_of(group=torch.tensor([0, 0])))[0].item() == -1
