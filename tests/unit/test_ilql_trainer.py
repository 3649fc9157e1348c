"""ILQL as a trainer: what it makes of samples, when targets move, and from what it samples."""

import pytest
import torch
from safetensors.torch import load_file

import trlx
from tests.builders import VOCABULARY, tiny_gpt2
from tests.builders import responses as sampled
from tests.runs import DIALOGUES, PROMPTS, REWARDS, length, metrics, run, share_of_a, tiny_config
from trlx.batch import TokenOutputs
from trlx.methods.ilql import ilql_loss
from trlx.models.policy import build_policy
from trlx.sampling.rules import Rules
from trlx.sampling.settings import SamplingConfig

EOS = 2


def train(folder, changes=None, **arguments):
    config = tiny_config(folder, "ILQL", **{"train": {"total_steps": 1}, **(changes or {})})
    return trlx.train(config=config, **{"samples": DIALOGUES, "rewards": REWARDS, "metric_fn": length, **arguments})


def q_weights(folder, step, kind):
    saved = load_file(folder / f"checkpoint_{step}" / "policy.safetensors")
    return torch.cat([saved[name].flatten() for name in sorted(saved) if name.startswith(f"heads.q.{kind}.")])


def test_targets_move_after_every_nth_step_across_the_ends_of_epochs_and_stay_between(tmp_path):
    # 7 samples in batches of 4: an epoch is 2 steps
    method = {"steps_for_target_q_sync": 3, "alpha": 0.25}
    run("ILQL", tmp_path, method=method, train={"checkpoint_interval": 1, "total_steps": 7})
    heads = {step: q_weights(tmp_path, step, "heads") for step in range(1, 8)}
    targets = {step: q_weights(tmp_path, step, "targets") for step in range(1, 8)}
    assert torch.equal(targets[1], targets[2])
    assert torch.allclose(targets[3], 0.25 * heads[3] + 0.75 * targets[2], atol=1e-7)
    assert torch.equal(targets[3], targets[4]) and torch.equal(targets[4], targets[5])
    assert torch.allclose(targets[6], 0.25 * heads[6] + 0.75 * targets[5], atol=1e-7)
    assert torch.equal(targets[6], targets[7])
    assert not torch.equal(targets[2], targets[3]) and not torch.equal(targets[5], targets[6])


def random_policy():
    """A tiny policy with two Q heads, whose targets and value head say something."""
    policy = build_policy(tiny_gpt2(), value_head=True, q_heads=2).eval()
    with torch.no_grad():
        for weight in policy.heads.parameters():
            weight.normal_()
    return policy


def test_sampling_shifts_by_the_lowest_target_q_less_v_then_cuts_to_top_k_then_divides_by_temperature(monkeypatch):
    policy, prompts, drawn = random_policy(), [[5, 6, 7], [8]], []
    shape = Rules.__call__

    def noting(*args):
        shaped = shape(*args)
        drawn.append(shaped.softmax(dim=-1))
        return shaped

    monkeypatch.setattr(Rules, "__call__", noting)
    sampling = SamplingConfig(max_new_tokens=3, top_k=4, temperature=2.0, extra={"beta": 0.5})
    responses = sampled(policy, prompts, sampling)
    assert [probabilities.shape for probabilities in drawn] == [(2, VOCABULARY)] * 3
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        for step, probabilities in enumerate(drawn):
            with torch.no_grad():
                hidden = policy.model.transformer(torch.tensor([prompt + response[:step]]))[0][0, -1]
                logprobs = policy.model.lm_head(hidden).log_softmax(dim=-1)
                first, second = (target(hidden) for target in policy.q_heads.targets)
                shifted = logprobs + 0.5 * (torch.minimum(first, second) - policy.value_head.layers(hidden))
            kept = shifted.topk(4).indices
            by_hand = torch.zeros(VOCABULARY).index_copy(0, kept, (shifted[kept] / 2.0).softmax(dim=0))
            assert torch.allclose(probabilities[row], by_hand, atol=1e-5)


def test_beta_0_samples_from_the_policy_and_no_hook_stays_behind():
    policy = random_policy()
    greedy = {"max_new_tokens": 4, "do_sample": False}
    plain = sampled(policy, [[5, 6]], SamplingConfig(**greedy))
    assert sampled(policy, [[5, 6]], SamplingConfig(**greedy, extra={"beta": 0})) == plain
    assert sampled(policy, [[5, 6]], SamplingConfig(**greedy, extra={"beta": 100})) != plain
    assert sampled(policy, [[5, 6]], SamplingConfig(**greedy)) == plain
    assert not policy.model.transformer._forward_hooks


@pytest.mark.parametrize("prompts", [[[4]], [[4], [9, 9, 20], [6]]])
@pytest.mark.parametrize("settings", [{"do_sample": False}, {"temperature": 9.0, "top_k": 20}])
def test_a_forbidden_token_never_follows_whatever_the_number_of_prompts(prompts, settings):
    forbidden = torch.ones(VOCABULARY, VOCABULARY, dtype=torch.bool)
    following = torch.arange(VOCABULARY - 1)
    forbidden[following, following + 1] = False  # after each token only the one after it
    for extra in ({"logit_mask": forbidden}, {"logit_mask": forbidden.tolist(), "beta": 100}):
        responses = sampled(random_policy(), prompts, SamplingConfig(max_new_tokens=3, **settings, extra=extra))
        assert responses == [[prompt[-1] + 1, prompt[-1] + 2, prompt[-1] + 3] for prompt in prompts]


def test_the_trainers_logit_mask_holds_at_evaluation_and_in_generate(tmp_path):
    forbidden = torch.ones(VOCABULARY, VOCABULARY, dtype=torch.bool)
    forbidden[:, 10] = False
    seen = []

    def metric(outputs, **kwargs):
        seen.extend(outputs)
        return {}

    trainer = train(
        tmp_path, {"train": {"total_steps": 0, "trainer_kwargs": {"logit_mask": forbidden}}}, metric_fn=metric
    )
    assert set(seen) == {"gggggg"}
    assert trainer.sampling({"max_new_tokens": 3, "beta": 7}).extra.keys() == {"beta", "logit_mask"}
    assert trainer.generate([[4]], beta=1, max_new_tokens=2).tolist() == [[4, 10, 10]]


def test_beta_is_swept_at_evaluation_and_the_best_checkpoint_follows_it(tmp_path):
    run("ILQL", tmp_path, train={"total_steps": 1})
    first = metrics(tmp_path)[0]
    assert {"metrics/length@beta=0", "metrics/length@beta=2"} <= first.keys() and "metrics/length" not in first
    train(tmp_path / "best", metric_fn=lambda samples, **kw: {"reward": [float(len(sample)) for sample in samples]})
    assert (tmp_path / "best" / "best_checkpoint" / "hf_model").is_dir()


def test_generate_asks_which_value_of_a_sweep_is_meant(tmp_path):
    trainer = run("ILQL", tmp_path, train={"total_steps": 0})
    with pytest.raises(ValueError, match=r"beta is the list \[0, 2\].*e.g. beta=2 in trainer.generate"):
        trainer.generate([[4]])
    assert trainer.generate([[4]], beta=2, max_new_tokens=2, do_sample=False).shape[1] <= 3


def test_beta_and_top_k_have_the_defaults_old_scripts_rely_on(tmp_path):
    trainer = train(tmp_path, {"train": {"total_steps": 0}})
    sampling = trainer.sampling({"max_new_tokens": 3})
    assert (sampling.extra["beta"], sampling.top_k) == (1, 20)
    assert trainer.sampling({"max_new_tokens": 3, "beta": 7, "top_k": 0}).extra == {"beta": 7}
    assert not trainer.sampling({"max_new_tokens": 3, "temperature": 0}).do_sample


def test_rewards_are_normalised_over_the_samples_kept_and_stand_at_the_last_action(tmp_path):
    samples = [["ab", "c"], ["a", "bc"], ["abcdefgh", "x"]]  # of the last no output fits into 6 tokens
    trainer = train(tmp_path, {"train": {"total_steps": 0}}, samples=samples[:2], rewards=[0.0, 1.0])
    trainer.make_experience(samples, [1.0, 3.0, 100.0], 6)
    batch = trainer.store.rows([0, 1])
    half = 0.5**0.5  # (1 - 2) / std, the unbiased std of 1 and 3 being the root of 2
    assert batch.scores.flatten().tolist() == pytest.approx([0, 0, 0, -half, 0, 0, 0, half], abs=1e-6)
    assert batch.tokens[:, 3].tolist() == [EOS, EOS]


def test_the_loss_has_the_configs_coefficients(tmp_path):
    settings = {"tau": 0.9, "gamma": 0.5, "cql_scale": 0.3, "awac_scale": 2.0, "beta": 0.7}
    trainer = train(tmp_path, {"method": settings, "train": {"total_steps": 0}})
    batch = trainer.store.rows([0, 1, 2])
    one, two = torch.randn(5, *batch.tokens.shape), torch.randn(2, 2, *batch.tokens.shape)
    scores = TokenOutputs(one[0], one[1], one[2:4], two[0], two[1])
    assert trainer.loss(scores, batch)[0] == ilql_loss(scores, batch, **settings)[0]


def test_one_q_head_is_enough(tmp_path):
    trainer = run("ILQL", tmp_path, method={"two_qs": False}, train={"total_steps": 2})
    step = next(line for line in metrics(tmp_path) if "losses/loss" in line)
    assert len(trainer.backend.policy.q_heads.heads) == 1
    assert "qvalues/0/mean" in step and "qvalues/1/mean" not in step


def test_ilql_learns_which_output_is_rewarded(tmp_path):
    samples, rewards = [["a", letter] for letter in "bcd"] * 4, [0.0, 1.0, 0.0] * 4
    changes = {
        "train": {"total_steps": 60, "epochs": 60, "batch_size": 12, "eval_interval": 60},
        "method": {"gen_kwargs": {"max_new_tokens": 1, "beta": 20}},
        "optimizer": {"kwargs": {"lr": 1e-2}},
    }
    trainer = train(tmp_path, changes, samples=samples, rewards=rewards, eval_prompts=["a"] * 4)
    assert trainer.generate([trainer.tokenizer("a")["input_ids"]] * 4)[:, 1].tolist() == [6] * 4  # c


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, {"rewards": [0.0] * 6 + [float("nan")]}, r"rewards\[6\] is nan"),
        ({}, {"rewards": None}, "learns from rewards: pass rewards"),
        ({}, {"rewards": [1.0]}, "7 samples but 1 rewards"),
        ({"train": {"trainer_kwargs": {"logit_mask": [[True]]}}}, {}, r"shape \[1, 1\], but the model has 38 tokens"),
        ({"method": {"name": "SFTConfig"}}, {}, "no field|Unknown"),
    ],
)
def test_wrong_input_is_refused(tmp_path, changes, arguments, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path, changes, **arguments)


def test_a_trainer_for_another_method_is_refused(tmp_path):
    config = tiny_config(tmp_path, "SFT", train={"trainer": "AccelerateILQLTrainer"})
    with pytest.raises(ValueError, match="needs method.name ILQLConfig"):
        trlx.train(config=config, samples=DIALOGUES, rewards=REWARDS)


@pytest.mark.parametrize("method", ["PPO", "RFT"])
def test_beta_outside_ilql_is_refused(tmp_path, method):
    config = tiny_config(tmp_path, method, method={"gen_kwargs": {"beta": 1}})
    with pytest.raises(ValueError, match="gen_kwargs.beta is 1, but only ILQL"):
        trlx.train(config=config, reward_fn=share_of_a, prompts=PROMPTS)


def test_rewards_for_sft_are_refused(tmp_path):
    with pytest.raises(ValueError, match="AccelerateSFTTrainer does not use rewards"):
        trlx.train(config=tiny_config(tmp_path, "SFT"), samples=DIALOGUES, rewards=REWARDS)
