"""GRPO and its relatives: numbers worked by hand, and that each setting arrives where it counts."""

import math
import re

import pytest
import torch

from tests.builders import tiny_gpt2_config
from tests.fake_backend import FakeBackend
from tests.runs import run, tiny_config
from tests.unit.test_seq2seq import CONFIGS, run_seq2seq
from trlx.batch import Sample, TokenBatch, TokenOutputs
from trlx.config import TRLConfig
from trlx.data.prompts import PromptPipeline
from trlx.methods.advantages import group_advantages, overlong_penalty, rewards_to_go
from trlx.methods.grpo import UNITS, grpo_loss
from trlx.methods.masked import finish, pack
from trlx.methods.units import Unit
from trlx.rewards.weighted import WeightedRewards
from trlx.trainer.accelerate import AccelerateGRPOTrainer
from trlx.trainer.grpo import GRPOTrainer

EOS = 2
LN2 = math.log(2)


def near(wanted):
    return pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        # the first group has 1, 2, 6: mean 3, and (4 + 1 + 9) / 2 = 7 is the square of the std
        ("grpo", [-2 / (7**0.5 + 1e-4), 0, -1 / (7**0.5 + 1e-4), 0, 3 / (7**0.5 + 1e-4)]),
        ("dr_grpo", [-2, 0, -1, 0, 3]),
        ("rloo", [-3, 0, -1.5, 0, 4.5]),  # 1 - (2 + 6) / 2
    ],
)
def test_a_sample_is_compared_with_its_group(kind, wanted):
    found = group_advantages(torch.tensor([1.0, 5, 2, 5, 6]), torch.tensor([0, 1, 0, 1, 0]), kind)
    assert found.tolist() == near(wanted)


def test_rewards_to_go_add_up_what_follows():
    mask = torch.tensor([[False, True, True, False, True]])
    assert rewards_to_go(torch.tensor([[9.0, 1, 2, 9, 4]]), mask).tolist() == [[0, 7, 6, 0, 4]]


def test_the_penalty_for_length_begins_with_the_buffer():
    found = overlong_penalty(torch.tensor([5, 6, 7, 8, 10, 11]), max_length=10, buffer=4)
    assert found.tolist() == [0, 0, -0.25, -0.5, -1, -1]


def rows():
    """Two responses, of two tokens and one; the ratios are 1.5, 0.5 and 1.1, the advantages 1, 1 and -2."""
    mask = torch.tensor([[False, True, True], [False, True, False]])
    ratio = torch.tensor([[1.0, 1.5, 0.5], [1.0, 1.1, 1.0]])
    logprobs = (-1 + ratio.log()) * mask
    reference = logprobs - torch.tensor([[0.0, LN2, 0.0], [0.0, 0.0, 0.0]])
    advantages = torch.tensor([[0.0, 1.0, 1.0], [0.0, -2.0, 0.0]])
    batch = TokenBatch(torch.ones(2, 3).long(), mask | True, mask, torch.zeros(2, 3), old_logprobs=-1.0 * mask)
    return TokenOutputs(logprobs), batch.replace(advantages=advantages, ref_logprobs=reference)


@pytest.mark.parametrize(
    ("kind", "wanted", "units"),
    [
        # clipped to 0.8 ... 1.3 the tokens of the first row cost -1.3 and -0.5, that of the second 2.2
        ("grpo", (-1.3 - 0.5) / 2 + 2.2, 2),
        ("dr_grpo", (-1.3 - 0.5 + 2.2) / 4, 2),
        ("dapo", -1.3 - 0.5 + 2.2, 3),
        ("gspo", -(0.75**0.5) + 2.2, 2),  # the first row's ratio is (1.5 * 0.5) ** (1 / 2)
    ],
)
def test_each_loss_weighs_tokens_in_its_own_way(kind, wanted, units):
    outputs, batch = rows()
    loss, metrics = grpo_loss(outputs, batch, kind, 0.2, 0.3, max_length=4)
    assert float(loss) == near(wanted) and int(UNITS[kind].count(batch)) == units
    found = finish(*pack(metrics))
    assert found["losses/total_loss"] == near(wanted / units)
    assert found["policy/ratio_deviation/max"] == near(1 - 0.75**0.5 if kind == "gspo" else 0.5)
    ratios = [0.75**0.5] * 2 + [1.1] if kind == "gspo" else [1.5, 0.5, 1.1]
    assert found["policy/approx_kl"] == near(sum(r - 1 - math.log(r) for r in ratios) / 3)
    short = batch.replace(attention_mask=torch.tensor([[True] * 3, [True, True, False]]))
    found = finish(*pack(grpo_loss(outputs, short, kind, 0.6, 0.3, 4)[1]))
    # 1.5 is clipped, and in GSPO no ratio; 0.5 and 1.1 are inside
    assert found["padding_percentage"] == near(1 / 6) and found["policy/clipfrac"] == near((kind != "gspo") / 3)
    assert (found["policy/clipfrac_low"], found["policy/clipfrac_high"]) == (0, found["policy/clipfrac"])


def test_the_kl_to_the_reference_is_added_token_by_token():
    outputs, batch = rows()
    kl = 0.5 - 1 + LN2  # of the first token of the first row: log r is -ln 2
    for kind, weight in (("grpo", 1 / 2), ("dr_grpo", 1 / 4), ("dapo", 1.0)):
        without, _ = grpo_loss(outputs, batch, kind, 0.2, 0.3, 4)
        loss, metrics = grpo_loss(outputs, batch, kind, 0.2, 0.3, 4, kl_coef=0.1)
        assert float(loss - without) == near(0.1 * kl * weight)
        assert finish(*pack(metrics))["losses/kl"] == near(kl / 3)


def test_a_token_that_is_clipped_has_no_gradient():
    outputs, batch = rows()
    outputs.logprobs.requires_grad_()
    grpo_loss(outputs, batch, "dapo", 0.2, 0.3, 4)[0].backward()
    # the ratio 1.5 is above 1.3 where more would be better; of the others the gradient is -A times the ratio
    assert outputs.logprobs.grad.tolist() == [near([0, 0, -0.5]), near([0, 2.2, 0])]


class FakeGRPOTrainer(GRPOTrainer):
    """GRPO on tables."""

    backend_class = FakeBackend


# k1 is log pi - log pi_ref: 0.5 for token 4, 0 for eos, -1 for token 5, 0.5 for 6, 0 for 7
LOGPROBS = {4: -0.5, EOS: -1.0, 5: -2.0, 6: -0.25, 7: -1.5}
REFERENCE = {4: -1.0, EOS: -1.0, 5: -1.0, 6: -0.75, 7: -1.5}
ANSWERS = [[4, EOS], [5, 6, 7], [6, EOS], [4, 4, EOS]]
"""Two of each prompt, in order."""
SCORES = {(4, EOS): 2.0, (5, 6, 7): 4.0, (6, EOS): 1.0, (4, 4, EOS): 4.0}
PARTS = {(4, EOS): [0.5, 1], (5, 6, 7): [0.5, 0, 2], (6, EOS): [0, 1], (4, 4, EOS): [0.5, 0.5, 1.5]}


def per_sample(output_ids):
    return [SCORES[tuple(ids)] for ids in output_ids]


def per_token(output_ids):
    return [PARTS[tuple(ids)] for ids in output_ids]


def one(outputs):
    return [1.0] * len(outputs)


# twice the numbers per token, less 1 at the last one: 1, 1; 1, 0, 3; 0, 1; 1, 1, 2 add up to SCORES
WEIGHTED = WeightedRewards([(per_token, 2.0), (one, -1.0)])


def trainer_of(folder, monkeypatch, answers=ANSWERS, reward=per_sample, **method):
    monkeypatch.setattr(FakeBackend, "logprobs", LOGPROBS)
    monkeypatch.setattr(FakeBackend, "ref_logprobs", REFERENCE)
    settings = tiny_config(folder, "PPO", model={"model_path": tiny_gpt2_config()}).to_dict()
    sizes = {"num_rollouts": 4, "num_generations": 2, "chunk_size": 2, "gen_kwargs": {"max_new_tokens": 4}}
    settings["method"] = {"name": "GRPOConfig", **sizes, **method}
    trainer = FakeGRPOTrainer(config=TRLConfig.from_dict(settings), reward_fn=reward)
    trainer.add_prompt_pipeline(PromptPipeline([[10], [11], [12], [13]], 8, trainer.tokenizer))
    drawn = iter(answers)
    trainer.sampler.generate = lambda prompts, sampling: [Sample(next(drawn)) for _ in prompts]
    return trainer


def by_row(batch):
    """The advantages of each row's response tokens."""
    return [a[mask].tolist() for a, mask in zip(batch.advantages, batch.response_mask, strict=True)]


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        # 2 and 4, 1 and 4: half the difference is 1, or 1.5; the std is the difference by the root of 2
        ({"advantage": "dr_grpo"}, [-1, 1, -1.5, 1.5]),
        (
            {"advantage": "grpo"},
            [-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), -1.5 / (4.5**0.5 + 1e-4), 1.5 / (4.5**0.5 + 1e-4)],
        ),
        ({"advantage": "rloo"}, [-2, 2, -3, 3]),
        # KL in the reward, 0.2 of k1: 0.5, -0.5, 0.5 and 1 in all
        ({"advantage": "rloo", "kl_in": "reward", "kl_coef": 0.2}, [-2.2, 2.2, -2.9, 2.9]),
        # a buffer of 2 before 4 tokens: three tokens pay half of 0.6
        ({"advantage": "rloo", "overlong_buffer": 2, "overlong_penalty": 0.6}, [-1.7, 1.7, -2.7, 2.7]),
        ({"advantage": "rloo", "scale_reward": "ref", "ref_std": 2.0}, [-1, 1, -1.5, 1.5]),
    ],
)
@pytest.mark.parametrize("reward", [per_sample, WEIGHTED], ids=["per sample", "weighted, per token"])
def test_the_advantage_of_a_sample_stands_at_each_of_its_tokens(tmp_path, monkeypatch, method, wanted, reward):
    batch = trainer_of(tmp_path, monkeypatch, reward=reward, **method).collect()
    assert batch.group.tolist() == [0, 0, 1, 1] and batch.old_values is None
    assert by_row(batch) == [near([a] * len(ids)) for a, ids in zip(wanted, ANSWERS, strict=True)]


@pytest.mark.parametrize(
    ("reward", "penalty", "to_go"),
    [
        # rewards: -0.1, 2; 0.2, -0.1, 4; -0.1, 1; -0.1, -0.1, 4
        (per_sample, {}, [[1.9, 2], [4.1, 3.9, 4], [0.9, 1], [3.8, 3.9, 4]]),
        # 0.9, 1; 1.2, -0.1, 3; -0.1, 1; 0.9, 0.9, 2
        (WEIGHTED, {}, [[1.9, 1], [4.1, 2.9, 3], [0.9, 1], [3.8, 2.9, 2]]),
        # the last of three tokens pays half of 0.6, and those before it see that
        (
            WEIGHTED,
            {"overlong_buffer": 2, "overlong_penalty": 0.6},
            [[1.9, 1], [3.8, 2.6, 2.7], [0.9, 1], [3.5, 2.6, 1.7]],
        ),
    ],
)
def test_reinforce_plus_plus_whitens_rewards_to_go_over_the_collection(tmp_path, monkeypatch, reward, penalty, to_go):
    method = {"advantage": "reinforce++", "kl_in": "reward", "kl_coef": 0.2, **penalty}
    trainer = trainer_of(tmp_path, monkeypatch, reward=reward, **method)
    flat = [number for row in to_go for number in row]
    mean = sum(flat) / 10
    std = (sum((number - mean) ** 2 for number in flat) / 10) ** 0.5
    assert by_row(trainer.collect()) == [near([(number - mean) / std for number in row]) for row in to_go]


def test_reinforce_plus_plus_with_a_baseline_whitens_what_is_above_the_group(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, monkeypatch, advantage="reinforce++_baseline")
    above = [[-1] * 2, [1] * 3, [-1.5] * 2, [1.5] * 3]
    flat = [number for row in above for number in row]
    mean = sum(flat) / 10  # 0.25
    std = (sum((number - mean) ** 2 for number in flat) / 10) ** 0.5
    assert by_row(trainer.collect()) == [near([(number - mean) / std for number in row]) for row in above]


def test_groups_whose_scores_are_alike_are_drawn_again_from_other_prompts(tmp_path, monkeypatch):
    answers = [[4, EOS], [4, EOS], [6, EOS], [4, 4, EOS], [4, EOS], [5, 6, 7]]
    trainer = trainer_of(tmp_path, monkeypatch, answers, advantage="rloo", max_resamplings=3)
    batch = trainer.collect()
    assert by_row(batch) == [near([-2] * 2), near([2] * 3), near([-3] * 2), near([3] * 3)]
    assert batch.group.tolist() == [0, 0, 1, 1] and trainer.stream.position == 3
    assert trainer.pending["rollouts/groups_alike"] == 0 and len(set(batch.tokens[:, 0].tolist())) == 2
    # here the second group is drawn again, as the first one of its collection
    again = [*ANSWERS[:2], [6, EOS], [6, EOS], *ANSWERS[2:]]
    trainer = trainer_of(tmp_path, monkeypatch, again, advantage="rloo", max_resamplings=1)
    batch = trainer.collect()
    assert batch.group.tolist() == [0, 0, 1, 1]
    assert by_row(batch) == [near([-2] * 2), near([2] * 3), near([-3] * 2), near([3] * 3)]
    # a group with one score that differs stays
    trainer = trainer_of(tmp_path, monkeypatch, [*[[4, EOS]] * 3, [6, EOS]], num_generations=4, max_resamplings=1)
    assert trainer.collect().group.tolist() == [0] * 4 and trainer.stream.position == 1
    trainer = trainer_of(tmp_path, monkeypatch, [[4, EOS]] * 8, advantage="rloo", max_resamplings=1)
    assert by_row(trainer.collect()) == [[0, 0]] * 4  # once is all that was asked for
    assert trainer.pending["rollouts/groups_alike"] == 1 and trainer.stream.position == 4


def test_a_reference_is_kept_only_where_there_is_a_kl(tmp_path, monkeypatch):
    for kl_coef, has_reference in ((0.0, False), (0.1, True)):
        trainer = trainer_of(tmp_path, monkeypatch, kl_coef=kl_coef)
        needs, batch = trainer.backend.needs, trainer.collect()
        assert (needs.reference, needs.value_head, needs.dropout) == (has_reference, False, False)
        assert (batch.ref_logprobs is not None) is has_reference
        assert ("policy/kl" in trainer.pending) is has_reference


def test_a_resumed_run_trains_on_a_collection_only_if_it_has_the_reference_that_the_loss_needs(tmp_path, monkeypatch):
    first = trainer_of(tmp_path, monkeypatch, kl_coef=0.0)
    first.store = first.collect()
    for kl_coef, is_kept in ((0.0, True), (0.1, False)):
        again = trainer_of(tmp_path, monkeypatch, kl_coef=kl_coef)
        again.load_state_dict(first.state_dict())
        assert (again.store is not None) == is_kept


def test_the_loss_has_every_setting_in_its_place(tmp_path, monkeypatch):
    outputs, batch = rows()
    for method, wanted in (
        ({"loss_type": "dapo", "cliprange": 0.1, "kl_coef": 0.0}, -1.1 - 0.5 + 2.2),
        ({"loss_type": "dapo", "cliprange_high": 0.4, "kl_coef": 0.0}, -1.4 - 0.5 + 2.2),
        ({"loss_type": "dr_grpo", "kl_coef": 0.0}, (-1.2 - 0.5 + 2.2) / 4),
        ({"loss_type": "dapo", "kl_coef": 0.1}, -1.2 - 0.5 + 2.2 + 0.1 * (LN2 - 0.5)),
        ({"loss_type": "dapo", "kl_coef": 0.1, "kl_in": "reward"}, -1.2 - 0.5 + 2.2),
    ):
        trainer = trainer_of(tmp_path, monkeypatch, **method)
        assert float(trainer.loss(outputs, batch)[0]) == near(wanted)
        assert trainer.unit is (Unit.TOKEN if method["loss_type"] == "dapo" else Unit.SEQUENCE)
    assert trainer_of(tmp_path, monkeypatch, num_iterations=3).passes_per_epoch == 3


def test_a_first_update_of_another_policy_than_the_one_that_sampled_is_warned_of(tmp_path, monkeypatch, caplog):
    trainer = trainer_of(tmp_path, monkeypatch)
    for step, deviation, warned in ((1, 0.0, False), (2, 0.6, False), (1, 0.6, True)):
        trainer.schedule.step = step
        trainer.after_step({"policy/ratio_deviation/max": deviation})
        assert ("the probability ratio is up to 0.6 away from 1" in caplog.text) == warned


def test_a_chunk_has_as_many_samples_as_chunk_size_says(tmp_path, monkeypatch):
    sizes = []

    def counted(output_ids):
        sizes.append(len(output_ids))
        return per_sample(output_ids)

    trainer_of(tmp_path, monkeypatch, reward=counted).collect()
    assert sizes == [2, 2]


RLOO = {"advantage": "rloo", "loss_type": "dapo", "kl_in": "reward"}
REINFORCE = {"advantage": "reinforce++", "loss_type": "dapo", "kl_in": "reward", "num_generations": 1}
LORA = {"peft_config": {"peft_type": "LORA", "r": 4}}


@pytest.mark.parametrize("method", [{}, RLOO, REINFORCE], ids=["grpo", "rloo", "reinforce++"])
@pytest.mark.parametrize(
    ("family", "model", "trained"),
    [
        ("gpt2", {"num_layers_unfrozen": 1}, "transformer.(h.1|ln_f)."),
        ("gpt2", LORA, ".*lora_"),
        ("t5", {"num_layers_unfrozen": 1}, "decoder.(block.2|final_layer_norm)."),
        ("t5", LORA, ".*lora_"),
    ],
)
def test_it_starts_at_the_reference_and_changes_only_what_trains(tmp_path, family, model, trained, method):
    if model is LORA:
        pytest.importorskip("peft")
    settings = {"method": method, "train": {"total_steps": 0, "minibatch_size": 4}}
    if family == "t5":
        trainer = run_seq2seq("GRPO", tmp_path, {"model_path": CONFIGS["t5"](), **model}, **settings)
    else:
        trainer = run("GRPO", tmp_path, model=model, **settings)
    backend, batch = trainer.backend, trainer.collect()
    first = backend.evaluate(batch).logprobs
    assert trainer.pending["policy/kl"] == 0 and torch.equal(batch.ref_logprobs, first)
    before = {name: weight.clone() for name, weight in backend.policy.model.named_parameters()}
    stats = backend.train_step(batch, trainer.loss, trainer.unit)
    assert stats["policy/ratio_deviation/max"] < 1e-5
    changed = {
        name for name, weight in backend.policy.model.named_parameters() if not torch.equal(weight, before[name])
    }
    assert changed and [name for name in changed if not re.match(trained, name)] == []
    assert torch.equal(backend.evaluate(batch, reference=True).logprobs, first)
    assert not torch.equal(backend.evaluate(batch).logprobs, first)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"num_generations": 1}, "method.num_generations must be at least 2 with this advantage"),
        ({"num_generations": 1, "advantage": "reinforce++", "max_resamplings": 1}, "max_resamplings must be 0 with"),
        ({"num_generations": 8}, "method.num_rollouts must be at least method.num_generations"),
        ({"advantage": "gae"}, "method.advantage"),
        ({"kl_in": "both"}, "method.kl_in"),
        ({"overlong_buffer": 9}, r"method.overlong_buffer must be at most max_new_tokens \(4\)"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, monkeypatch, method, words):
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, monkeypatch, **method)


@pytest.mark.parametrize(
    ("rollouts", "generations", "said"),
    [
        (8, 4, ""),
        (6, 4, "has 8 rollouts, for method.num_rollouts 6 and groups of 4; .* trains on 4 of them, the others on 4"),
    ]
    + [(9, 3, "has 9 rollouts, for method.num_rollouts 9 and groups of 3; .* trains on 1 of them, the others on 4")],
)
def test_collections_of_other_sizes_than_asked_are_spoken_of(tmp_path, caplog, rollouts, generations, said):
    method = {"num_rollouts": rollouts, "num_generations": generations}
    config = tiny_config(tmp_path, "GRPO", method=method, model={"model_path": tiny_gpt2_config()})
    trainer = AccelerateGRPOTrainer(config=config, reward_fn=lambda samples, **kwargs: [0.0] * len(samples))
    with caplog.at_level("INFO"):
        trainer.add_prompt_pipeline(PromptPipeline([[5]], 8, trainer.tokenizer))
    assert bool(said) == ("A collection has" in caplog.text)
    assert re.search(said, caplog.text)
