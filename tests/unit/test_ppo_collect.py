"""`PPOTrainer.collect` against numbers worked out by hand, and that every setting of PPO arrives where it counts.

Three rollouts; k1 is log pi - log pi_ref of a token, k3 is r - 1 - log r with log r = log pi_ref - log pi.

    prompt  response   score   log pi         log pi_ref     k1            k3                     value
    10      4 eos      2       -0.5, -1       -1, -1         0.5, 0        0.1065307, 0           0.5, 0.25
    11      5 6 7      4       -2, -1/4, -3/2 -1, -3/4, -3/2 -1, 0.5, 0    0.7182818, 0.1065307, 0  1, 0, -0.5
    12      8 eos      100     -1, -1         -3/2, -1       0.5, 0        0.1065307, 0           0.25, 0.25
"""

import json
import math
import re
import time
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch

from tests.builders import tiny_gpt2_config
from tests.fake_backend import FakeBackend, FakePPOTrainer
from tests.runs import tiny_config
from trlx.backends.base import ModelNeeds
from trlx.batch import Rollout, Sample, TokenBatch, TokenOutputs
from trlx.data.prompts import PromptPipeline
from trlx.sampling.stopping import Stopper

EOS = 2
RESPONSES = {(10,): [4, EOS], (11,): [5, 6, 7], (12,): [8, EOS]}
SCORES = {10: 2.0, 11: 4.0, 12: 100.0}
K3 = {4: math.exp(-0.5) - 0.5, 5: math.e - 2, 6: math.exp(-0.5) - 0.5, 8: math.exp(-0.5) - 0.5}
METHOD = {
    "num_rollouts": 3,
    "chunk_size": 2,
    "ppo_epochs": 1,
    "init_kl_coef": 0.2,
    "target": 0.3,
    "horizon": 30,
    "gamma": 0.5,
    "lam": 0.8,
    "scale_reward": "running",
    "cliprange_reward": 6,
    "missing_eos_penalty": 0.5,
    "gen_kwargs": {"max_new_tokens": 3},
}


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    tables = {
        "responses": RESPONSES,
        "logprobs": {4: -0.5, EOS: -1.0, 5: -2.0, 6: -0.25, 7: -1.5, 8: -1.0},
        "ref_logprobs": {4: -1.0, EOS: -1.0, 5: -1.0, 6: -0.75, 7: -1.5, 8: -1.5},
        "values": {4: 0.5, EOS: 0.25, 5: 1.0, 6: 0.0, 7: -0.5, 8: 0.25},
    }
    for name, table in tables.items():
        monkeypatch.setattr(FakeBackend, name, table)


def trainer_of(folder, scores=SCORES, **method):
    def reward(samples, prompt_ids, **kwargs):
        return [scores[prompt[0]] for prompt in prompt_ids]

    settings = {"method": {**METHOD, **method}, "model": {"model_path": tiny_gpt2_config()}}
    trainer = FakePPOTrainer(config=tiny_config(folder, "PPO", **settings), reward_fn=reward)
    trainer.add_prompt_pipeline(PromptPipeline([list(prompt) for prompt in RESPONSES], 8, trainer.tokenizer))
    return trainer


def by_token(batch, column):
    """The numbers of response tokens; each rollout's eos under the name of its prompt's last token."""
    found = {}
    for tokens, mask, numbers in zip(batch.tokens, batch.response_mask, getattr(batch, column), strict=True):
        for token, number in zip(tokens[mask].tolist(), numbers[mask].tolist(), strict=True):
            found[int(tokens[0]) if token == EOS else token] = number
        assert not numbers[~mask].any()
    return found


def near(wanted):
    return pytest.approx(wanted, abs=1e-5)


# gamma 0.5, lam 0.8, so gamma lam 0.4. Clipped to 6 the scores are 2, 4, 6, of std 2: divided 1, 2, 3. The second
# rollout does not end and pays 0.5: 1.5. Rewards are less 0.2 k1.
REWARDS = {4: -0.1, 10: 1.0, 5: 0.2, 6: -0.1, 7: 1.5, 8: -0.1, 12: 3.0}
ADVANTAGES = {
    10: 0.75,  # 1 - 0.25
    4: -0.175,  # -0.1 + 0.5 * 0.25 - 0.5 = -0.475, and 0.4 * 0.75
    7: 2.0,  # 1.5 + 0.5
    6: 0.45,  # -0.1 + 0.5 * -0.5 - 0 = -0.35, and 0.4 * 2
    5: -0.62,  # 0.2 + 0.5 * 0 - 1 = -0.8, and 0.4 * 0.45
    12: 2.75,  # 3 - 0.25
    8: 0.875,  # -0.1 + 0.5 * 0.25 - 0.25 = -0.225, and 0.4 * 2.75
}
RETURNS = {10: 1.0, 4: 0.325, 7: 1.5, 6: 0.45, 5: 0.38, 12: 3.0, 8: 1.125}  # advantage + value
MEAN = 6.03 / 7
STD = (13.50815 / 7 - MEAN**2) ** 0.5  # 0.5625 + 0.030625 + 4 + 0.2025 + 0.3844 + 7.5625 + 0.765625 = 13.50815


def test_a_collection_by_hand(tmp_path):
    trainer = trainer_of(tmp_path)
    batch = trainer.collect()
    assert sorted(batch.tokens.tolist()) == [[10, 4, EOS, 0], [11, 5, 6, 7], [12, 8, EOS, 0]]
    assert by_token(batch, "scores") == near({4: 0, 10: 1, 5: 0, 6: 0, 7: 1.5, 8: 0, 12: 3})
    assert by_token(batch, "old_logprobs") == near({4: -0.5, 10: -1, 5: -2, 6: -0.25, 7: -1.5, 8: -1, 12: -1})
    assert by_token(batch, "ref_logprobs") == near({4: -1, 10: -1, 5: -1, 6: -0.75, 7: -1.5, 8: -1.5, 12: -1})
    assert by_token(batch, "old_values") == near({4: 0.5, 10: 0.25, 5: 1, 6: 0, 7: -0.5, 8: 0.25, 12: 0.25})
    assert by_token(batch, "returns") == near(RETURNS)
    assert by_token(batch, "advantages") == near({token: (a - MEAN) / STD for token, a in ADVANTAGES.items()})


def test_each_of_several_eos_ends_a_response(tmp_path):
    trainer = trainer_of(tmp_path, gen_kwargs={"max_new_tokens": 3, "eos_token_id": [EOS, 7]})
    assert by_token(trainer.collect(), "scores") == near({4: 0, 10: 1, 5: 0, 6: 0, 7: 2, 8: 0, 12: 3})


def test_what_is_logged_of_a_collection_by_hand(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.tracker = MagicMock()
    trainer.collect()
    kl = (3 * (math.exp(-0.5) - 0.5) + math.e - 2) / 3  # per sequence: 0.3459580
    wanted = {
        "rollout_scores/mean": 4.0,
        "rollout_scores/std": 2.0,
        "rollout_scores/running_mean": 4.0,
        "rollout_scores/running_std": 2.0,
        "policy/entropy": 7.25 / 7,
        "policy/kl": kl,
        "policy/sqrt_kl": kl**0.5,
        "policy/kl_per_token": kl * 3 / 7,
        "kl_ctl_value": 0.2,
        "rollouts/response_length": 7 / 3,
        "rollouts/ended": 2 / 3,
    }
    assert {name: trainer.pending[name] for name in wanted} == near(wanted)
    spread = [(row["low"], row["high"]) for row in trainer.tracker.log_samples.call_args.args[2]]
    assert spread == [(2, 100), near(((-0.62 - MEAN) / STD, (2.75 - MEAN) / STD))]
    # 0.3459580 / 0.3 - 1 = 0.1531933, by 3 rollouts of a horizon of 30
    assert trainer.kl.coef == near(0.2 * (1 + 0.1531933 / 10))
    assert trainer.collect() is not None and trainer.pending["kl_ctl_value"] == near(0.2030639)


def test_the_log_probabilities_of_a_sampler_are_compared_with_the_policys_as_far_as_it_gives_them(tmp_path):
    # the first response is 1/4 and 0 away, the second 1/2: behind it an eos stands for the stop sequence "cd"
    given = {10: [-0.75, -1.0], 11: [-2.5, -9.0, -9.0], 12: None}
    trainer = trainer_of(tmp_path)
    trainer.rollout_sampling = replace(trainer.rollout_sampling, stop=Stopper(trainer.tokenizer, ["cd"]))
    trainer.sampler.generate = lambda prompts, _: [Sample(RESPONSES[tuple(p)], given[p[0]]) for p in prompts]
    trainer.collect()
    found = [trainer.pending[f"rollouts/logprob_gap/{name}"] for name in ("mean", "min", "max")]
    assert found == near([0.25, 0.0, 0.5])


def test_what_a_method_does_not_need_is_not_evaluated(tmp_path, monkeypatch):
    asked = []
    evaluate = FakeBackend.evaluate
    monkeypatch.setattr(FakeBackend, "evaluate", lambda *args, **named: asked.append(named) or evaluate(*args, **named))
    trainer = trainer_of(tmp_path)
    for needs, times in ((ModelNeeds(), 1), (ModelNeeds(value_head=True), 1), (ModelNeeds(reference=True), 2)):
        trainer.model_needs = needs
        asked.clear()
        rollouts = [Rollout([10], [4, EOS])]
        batch = trainer._with_model_columns(trainer.backend.row_format.collate(rollouts, 0))
        assert (batch.old_values is not None, batch.ref_logprobs is not None) == (needs.value_head, needs.reference)
        assert len(asked) == times


def test_a_fixed_coefficient_stays_as_it_is(tmp_path):
    trainer = trainer_of(tmp_path, target=None)
    trainer.collect()
    assert trainer.kl.coef == 0.2


@pytest.mark.parametrize(
    ("estimator", "penalty"),
    [
        ("k1", {4: 0.5, 5: -1.0, 6: 0.5, 8: 0.5}),
        ("k2", {4: 0.125, 5: 0.5, 6: 0.125, 8: 0.125}),
        ("k3", K3),
    ],
)
def test_the_penalty_is_the_estimate_of_the_kl_that_was_asked_for(tmp_path, estimator, penalty):
    # with gamma 0 a token's return is its reward
    batch = trainer_of(tmp_path, kl_estimator=estimator, gamma=0.0).collect()
    scores = {4: 0, 10: 1, 5: 0, 6: 0, 7: 1.5, 8: 0, 12: 3}
    assert by_token(batch, "returns") == near({t: score - 0.2 * penalty.get(t, 0) for t, score in scores.items()})


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        # a second collection of the same scores: 2, 4, 6, 2, 4, 6 have a std of (16 / 5) ** 0.5
        ({"scale_reward": "running"}, [1, 2, 3], [2 / 3.2**0.5, 4 / 3.2**0.5, 6 / 3.2**0.5]),
        ({"scale_reward": "ref"}, [1, 2, 3], [1, 2, 3]),
        ({"scale_reward": "ref", "ref_std": 4.0}, [0.5, 1, 1.5], [0.5, 1, 1.5]),
        ({"scale_reward": None}, [2, 4, 6], [2, 4, 6]),
        ({"scale_reward": None, "cliprange_reward": 1.5}, [1.5, 1.5, 1.5], [1.5, 1.5, 1.5]),
        # 2, 4, 100 are -100/3, -94/3, 194/3 from their mean: the squares add up to 56472/9, and half of that is 9412/3
        ({"scale_reward": "ref", "cliprange_reward": None}, [score / (9412 / 3) ** 0.5 for score in (2, 4, 100)], None),
    ],
)
def test_scores_are_clipped_before_anything_is_made_of_them(tmp_path, changes, first, second):
    trainer = trainer_of(tmp_path, missing_eos_penalty=None, **changes)
    assert sorted(trainer.collect().scores.sum(dim=1).tolist()) == near(first)
    assert second is None or sorted(trainer.collect().scores.sum(dim=1).tolist()) == near(second)


def test_the_std_of_the_first_collection_is_kept_whatever_comes_later(tmp_path):
    scores = dict(SCORES)
    trainer = trainer_of(tmp_path, scores, missing_eos_penalty=None, scale_reward="ref")
    trainer.collect()
    scores.update({10: 0.0, 11: 1.0, 12: 3.0})
    assert sorted(trainer.collect().scores.sum(dim=1).tolist()) == near([0, 0.5, 1.5])


@pytest.mark.parametrize(
    ("scale_reward", "wanted"),
    [("ref", [0, 0.5, 1.5]), ("running", [score / (14 / 3) ** 0.5 for score in (0, 1, 3)])],
)
def test_a_resumed_run_divides_scores_by_what_the_first_one_would(tmp_path, scale_reward, wanted):
    first = trainer_of(tmp_path, missing_eos_penalty=None, scale_reward=scale_reward)
    first.collect()
    # 2, 4, 6 have a std of 2; with 0, 1, 3 the mean is 16 / 6, and (66 - 6 * (16 / 6) ** 2) / 5 is 14 / 3
    scores = {10: 0.0, 11: 1.0, 12: 3.0}
    again = trainer_of(tmp_path, scores, missing_eos_penalty=None, scale_reward=scale_reward)
    first.store = None
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert sorted(again.collect().scores.sum(dim=1).tolist()) == near(wanted)


def test_the_loss_has_every_setting_of_the_config_in_its_place(tmp_path):
    settings = {"cliprange": 0.1, "cliprange_value": 0.25, "vf_coef": 0.5, "dual_clip": 2.0}
    trainer = trainer_of(tmp_path, **settings)
    mask = torch.tensor([[False, True, True]])
    zeros = torch.zeros(1, 3)
    columns = {"old_logprobs": zeros, "old_values": zeros, "returns": 2 * mask, "scores": zeros}
    advantages = torch.tensor([[0.0, 1.0, -1.0]])
    batch = TokenBatch(torch.tensor([[10, 4, 5]]), mask | True, mask, advantages=advantages, **columns)
    loss, _ = trainer.loss(TokenOutputs(1.0 * mask, 1.0 * mask), batch)
    # both ratios are e. Advantage 1: -1.1 with a clip of 0.1; advantage -1: e, bounded by 2.
    # Both values are 1, clipped 0.25: (0.25 - 2) ** 2 / 2 = 1.53125 each, and half of that
    assert float(loss) == near(-1.1 + 2 + 2 * 1.53125 / 2)


def test_the_reference_the_value_head_and_no_dropout_are_asked_for_and_the_temperature_of_rollouts(tmp_path):
    method = {"num_value_layers_unfrozen": 1, "gen_experience_kwargs": {"max_new_tokens": 3, "temperature": 0.5}}
    needs = trainer_of(tmp_path, **method).backend.needs
    assert (needs.value_head, needs.reference, needs.dropout, needs.temperature) == (True, True, False, 0.5)
    assert needs.value_layers == 1


def test_the_seconds_of_generation_are_not_those_of_scoring(tmp_path):
    trainer = trainer_of(tmp_path)
    generate = trainer.sampler.generate

    def slow(prompts, sampling):
        time.sleep(0.05)
        return generate(prompts, sampling)

    trainer.sampler.generate = slow
    trainer.collect()
    assert trainer.pending["time/rollout_generate"] > 0.1 > trainer.pending["time/rollout_score"]  # two chunks


def test_each_data_rank_draws_random_numbers_of_its_own(tmp_path, monkeypatch):
    seeds = []
    for rank in range(2):
        monkeypatch.setattr(FakeBackend, "data_rank", rank)
        trainer_of(tmp_path)
        seeds.append(torch.initial_seed())
    assert seeds == [1000, 1001]


def test_evaluations_generate_for_as_many_prompts_at_once_as_rollouts_do(tmp_path):
    trainer, sizes = trainer_of(tmp_path), []
    trainer.add_eval_pipeline(PromptPipeline([[10], [11], [12]], 8, trainer.tokenizer))
    trainer.sampler.generate = lambda prompts, _: sizes.append(len(prompts)) or [Sample([4])] * len(prompts)
    trainer.evaluate()
    assert sizes == [2, 1]  # method.chunk_size is 2, train.batch_size 4


def test_evaluations_draw_by_step_and_data_rank_whatever_was_drawn_before(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeBackend, "data_size", 2)
    drawn = {}
    for rank in range(2):
        monkeypatch.setattr(FakeBackend, "data_rank", rank)
        trainer = trainer_of(tmp_path)
        trainer.add_eval_pipeline(PromptPipeline([[10], [11], [12]], 8, trainer.tokenizer))
        numbers = drawn[rank] = []

        def generate(prompts, sampling, numbers=numbers):
            numbers.append(torch.rand(()).item())
            return [Sample([4])] * len(prompts)

        trainer.sampler.generate = generate
        for trainer.schedule.step in (0, 1, 0):
            trainer.evaluate()
    assert all(numbers[0] == numbers[2] for numbers in drawn.values())
    assert len({*drawn[0], *drawn[1]}) == 4


@pytest.mark.parametrize(
    ("size", "chunk_size", "per_prompt", "groups"),
    [
        # three prompts: in one chunk, in chunks of two, and shared by two processes in chunks of two and one
        (1, 8, 2, [[0, 0, 1, 1, 2, 2]]),
        (1, 4, 2, [[0, 0, 1, 1, 2, 2]]),
        (2, 1, 1, [[0, 2], [1]]),
        (2, 8, 2, [[0, 0, 1, 1], [2, 2]]),
    ],
)
def test_samples_of_a_prompt_are_neighbours_with_a_number_that_no_other_prompt_has(
    tmp_path, monkeypatch, size, chunk_size, per_prompt, groups
):
    monkeypatch.setattr(FakeBackend, "data_size", size)
    monkeypatch.setattr(FakePPOTrainer, "samples_per_prompt", per_prompt)
    for rank in range(size):
        monkeypatch.setattr(FakeBackend, "data_rank", rank)
        trainer = trainer_of(tmp_path, chunk_size=chunk_size)
        rollouts = trainer.sample(trainer.stream.take(3))
        assert [rollout.group for rollout in rollouts] == groups[rank]
        prompts = [rollout.prompt for rollout in rollouts]
        assert prompts[::per_prompt] == prompts[per_prompt - 1 :: per_prompt]


@pytest.mark.parametrize("is_main", [True, False])
def test_rollouts_are_logged_by_the_main_process_alone(tmp_path, monkeypatch, is_main):
    monkeypatch.setattr(FakeBackend, "is_main", is_main)
    monkeypatch.setattr(FakeBackend, "leads", True)
    trainer, logged = trainer_of(tmp_path), []
    trainer.config.train.reward_on = "each_rank"
    trainer.log.write = lambda *_: logged.append(1)
    trainer.collect()
    assert len(logged) == is_main


def test_a_collection_is_whole_groups_and_the_same_number_of_them_on_every_process(tmp_path, monkeypatch):
    monkeypatch.setattr(FakePPOTrainer, "samples_per_prompt", 3)
    assert trainer_of(tmp_path, num_rollouts=7).rows_per_epoch == 9
    monkeypatch.setattr(FakeBackend, "data_size", 2)
    assert trainer_of(tmp_path, num_rollouts=7).rows_per_epoch == 12


@pytest.mark.parametrize(
    ("precision", "apart", "outcome"),
    [
        # k3 is apart ** 2 / 2: 16 eps are 0.125 in bfloat16 and 0.0156 in float16; 128 eps of float32 are 1.5e-5
        (torch.float32, 0.0, "silent"),
        (torch.float32, 1e-5, "silent"),
        (torch.float32, 2e-5, "2e-10 nats per token, where rounding \\(float32\\) explains 1e-10 at most"),
        (torch.float32, 0.03, "0.000446 nats per token, where rounding"),
        (torch.float32, 0.06, "stops"),
        (torch.float16, 0.015, "silent"),
        (torch.float16, 0.02, "0.000199 nats per token, where rounding \\(float16\\) explains 0.0001 at most"),
        (torch.float16, 0.06, "stops"),
        (torch.bfloat16, 0.12, "silent"),
        (torch.bfloat16, 0.2, "0.0187 nats per token, where rounding \\(bfloat16\\) explains 0.008 at most"),
        (torch.bfloat16, 0.3, "stops"),
        (torch.bfloat16, math.nan, "stops"),
    ],
)
def test_the_first_kl_is_0_up_to_rounding_in_the_precision_used(
    tmp_path, monkeypatch, caplog, precision, apart, outcome
):
    monkeypatch.setattr(FakeBackend, "precision", precision)
    monkeypatch.setattr(FakeBackend, "starts_at_reference", True)
    ours = {token: logprob - apart for token, logprob in FakeBackend.logprobs.items()}
    monkeypatch.setattr(FakeBackend, "ref_logprobs", ours)
    trainer = trainer_of(tmp_path)
    caplog.clear()
    if outcome == "stops":
        with pytest.raises(RuntimeError, match="nats per token instead of 0: this model gives two outputs for one"):
            trainer.collect()
        return
    trainer.collect()
    if outcome == "silent":
        assert not caplog.records
    else:
        assert re.search(f"KL between policy and reference is {outcome}", caplog.text)


def test_the_ratio_is_looked_at_on_the_first_minibatch_alone(tmp_path, caplog):
    trainer = trainer_of(tmp_path)
    warned = []
    for trainer.schedule.step, deviation in ((1, 1e-4), (1, 0.01), (2, 0.01)):
        caplog.clear()
        trainer.after_step({"policy/ratio_deviation/max": deviation})
        warned.append("up to 0.01 away from 1" in caplog.text)
    assert warned == [False, True, False]


def test_later_on_or_with_an_adapter_that_starts_elsewhere_any_kl_will_do(tmp_path, monkeypatch, caplog):
    trainer_of(tmp_path).collect()
    monkeypatch.setattr(FakeBackend, "starts_at_reference", True)
    trainer = trainer_of(tmp_path)
    trainer.schedule.step = 1
    trainer.collect()
    assert not [record for record in caplog.records if "KL" in record.message]
