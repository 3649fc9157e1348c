"""Rejection fine-tuning as a trainer: when samples grow, which are trained on, and how a run ends."""

import json

import pytest
import torch

import trlx
from tests.runs import PROMPTS, metrics, run, share_of_a, tiny_config, weights
from trlx import checkpoint
from trlx.methods.rft import thresholds
from trlx.rewards.scoring import RewardError
from trlx.sampling.generate import TransformersSampler


def selections(folder):
    """(step of the first batch, percentile, samples selected) of every epoch."""
    lines = [line for line in metrics(folder) if "percentile" in line]
    return [(line["step"], line["percentile"], line["len_samples_selected"]) for line in lines]


def test_samples_grow_every_n_improve_steps_epochs_and_the_threshold_rises_between(tmp_path):
    calls = []

    def counting(samples, prompts, outputs, **kwargs):
        calls.extend(prompts)
        return share_of_a(samples, prompts, outputs)

    method = {"start_percentile": 0.5, "end_percentile": 0.9, "n_improve_steps": 2, "n_generations_per_prompt": 3}
    config = tiny_config(tmp_path, "RFT", method=method, train={"epochs": 5, "total_steps": 500, "eval_interval": 999})
    trainer = trlx.train(config=config, reward_fn=counting, prompts=PROMPTS[:4])
    assert trainer.schedule.epoch == 5
    assert [percentile for _, percentile, _ in selections(tmp_path)] == pytest.approx([0.5, 0.7, 0.5, 0.7, 0.5])
    assert len(trainer.pool) == 3 * 4 * 3  # growths at epochs 0, 2 and 4
    versions = [rollout.version for rollout in trainer.pool]
    assert versions == sorted(versions) and len(set(versions)) == 3
    in_order = [prompt for prompt in PROMPTS[:4] for _ in range(3)]
    evaluations = 2 * 4  # at the start and at the end
    assert calls == PROMPTS[:4] + 3 * in_order + PROMPTS[:4] and len(calls) == 36 + evaluations


def test_as_many_responses_as_a_batch_has_rows_are_sampled_at_once_and_scored_at_temperature_1(tmp_path, monkeypatch):
    sizes, generate = [], TransformersSampler.generate

    def counted(self, prompts, sampling):
        sizes.append((len(prompts), sampling.temperature))
        return generate(self, prompts, sampling)

    monkeypatch.setattr(TransformersSampler, "generate", counted)
    method = {"n_generations_per_prompt": 2, "gen_kwargs": {"temperature": 0.5}}
    trainer = run("RFT", tmp_path, method=method, train={"total_steps": 1})
    # the evaluations have four prompts, the collection between them eight with two responses each
    assert sizes == [(4, 0.5)] * (1 + 4 + 1)
    assert trainer.model_needs.temperature == trainer.backend.policy.temperature == 1.0


def test_training_ends_with_the_last_epoch_evaluated_and_saved(tmp_path):
    trainer = run("RFT", tmp_path, train={"epochs": 2, "total_steps": 500})
    assert trainer.schedule.finished and trainer.schedule.epoch == 2 and trainer.schedule.step < 500
    assert [line["step"] for line in metrics(tmp_path) if "reward/mean" in line][-1] == trainer.schedule.step
    assert checkpoint.newest(tmp_path).name == f"checkpoint_{trainer.schedule.step:03d}"


def test_each_epoch_trains_on_the_samples_that_reach_their_prompts_threshold_each_once(tmp_path):
    def first_letter(outputs, **kwargs):
        return [ord(output[:1] or "a") for output in outputs]

    config = tiny_config(tmp_path, "RFT", train={"epochs": 1, "total_steps": 500})
    trainer = trlx.train(config=config, reward_fn=first_letter, prompts=PROMPTS)
    history = trainer.pool
    limit = thresholds([tuple(r.prompt) for r in history], [r.score for r in history], 0.5)
    wanted = {(tuple(r.prompt), tuple(r.response)) for r in history if r.score >= limit[tuple(r.prompt)]}
    trainer.schedule.epoch = 0
    chosen = [(tuple(r.prompt), tuple(r.response)) for r in trainer._selected().rollouts]
    assert set(chosen) == wanted and len(chosen) == len(wanted)
    assert 0 < len(wanted) < len(history)
    assert selections(tmp_path)[0][2] == len(wanted)


def test_the_loss_is_on_responses_only(tmp_path):
    trainer = run("RFT", tmp_path, train={"epochs": 1, "total_steps": 500})
    rollouts = trainer.pool[:3]
    store = type(trainer._selected())(rollouts, 0)
    lengths = [(len(r.prompt), len(r.prompt) + len(r.response)) for r in rollouts]
    for row, (start, end) in zip(store.rows([0, 1, 2]).response_mask.tolist(), lengths, strict=True):
        assert [i for i, counts in enumerate(row) if counts] == list(range(start, end))


def test_reward_fn_gets_tokenizer_and_metadata_and_dense_rewards_are_summed(tmp_path):
    prompts = [{"prompt": text, "number": i} for i, text in enumerate(PROMPTS[:3])]

    def reward(samples, prompts, outputs, tokenizer, number):
        assert [PROMPTS[i] for i in number] == prompts and tokenizer.eos_token_id == 2
        return [[0.25, 0.5] if len(output) > 1 else 0.75 for output in outputs]

    method = {"n_generations_per_prompt": 2, "gen_kwargs": {"min_new_tokens": 6}}
    config = tiny_config(tmp_path, "RFT", method=method, train={"total_steps": 1})
    trainer = trlx.train(config=config, reward_fn=reward, prompts=prompts)
    assert [rollout.score for rollout in trainer.pool] == [0.75] * 6
    line = next(line for line in metrics(tmp_path) if "scores_mean" in line)
    assert (line["scores_mean"], line["scores_dist/max"], line["thresholds"]) == pytest.approx((0.75, 0.75, 0.749))


def test_scores_of_the_first_prompt_and_selected_samples_of_each_prompt_are_logged(tmp_path):
    def reward(prompts):
        return [0, 1, 2, 3] if prompts[0] == "ab" else [5] * len(prompts)

    # the quantiles, 1.5 and 5, are brought to 1.501 and 4.999: two samples of the first prompt, all of the second
    method = {"n_generations_per_prompt": 4, "start_percentile": 0.5, "gen_kwargs": {"min_new_tokens": 6}}
    config = tiny_config(tmp_path, "RFT", method=method, train={"total_steps": 1})
    trlx.train(config=config, reward_fn=reward, prompts=["ab", "h"], eval_prompts=["h"])
    line = next(line for line in metrics(tmp_path) if "scores_mean" in line)
    found = {
        name: [line[f"{name}/{kind}"] for kind in ("mean", "std", "min", "max")]
        for name in ("scores_per_single_prompt", "samples_per_single_prompt")
    }
    assert found["scores_per_single_prompt"] == pytest.approx([1.5, (5 / 3) ** 0.5, 0, 3])
    assert found["samples_per_single_prompt"] == pytest.approx([3, 2**0.5, 2, 4])
    assert line["len_samples_selected"] == 6


def test_history_comes_back_to_the_last_bit(tmp_path):
    trainer = run("RFT", tmp_path, train={"total_steps": 2})
    trainer.pool[0].score = 0.1 + 0.2
    before = [(one.prompt, one.response, one.score) for one in trainer.pool]
    trainer.save(tmp_path / "saved")
    trainer.pool = []
    trainer.load(tmp_path / "saved")
    assert [(one.prompt, one.response, one.score) for one in trainer.pool] == before and len(before) == 32


def test_a_failing_reward_leaves_the_history_as_it_was(tmp_path):
    calls = []

    def failing(samples, prompts, outputs, **kwargs):
        calls.append(1)
        if len(calls) == 12:  # an evaluation, the 8 chunks of the first growth, the third chunk of the second
            raise ZeroDivisionError("division by zero")
        return share_of_a(samples, prompts, outputs)

    changes = {"train": {"total_steps": 20, "eval_interval": 100}}
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        trlx.train(config=tiny_config(tmp_path / "a", "RFT", **changes), reward_fn=failing, prompts=PROMPTS)
    saved = checkpoint.newest(tmp_path / "a")
    state, _ = checkpoint.read_state(saved)
    assert len(state["history"]) == 32 and state["schedule"]["epoch"] == 2
    run("RFT", tmp_path / "a", train={**changes["train"], "resume_from_checkpoint": "auto"})
    run("RFT", tmp_path / "whole", **changes)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "whole")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_rollouts_are_written_where_asked(tmp_path):
    (tmp_path / "log").mkdir()
    run("RFT", tmp_path / "run", train={"total_steps": 1, "rollout_logging_dir": str(tmp_path / "log")})
    (epoch,) = (tmp_path / "log").glob("run-*/epoch-*.json")
    assert len(json.loads(epoch.read_text())) == 8 * 4
    assert len((tmp_path / "run" / "samples" / "rollout_00000000.jsonl").read_text().splitlines()) == 8


def test_rft_learns_what_the_reward_asks_for(tmp_path):
    train = {"total_steps": 60, "eval_interval": 60, "batch_size": 32}
    changes = {"train": train, "optimizer": {"kwargs": {"lr": 1e-2}}}
    method = {"n_improve_steps": 2, "n_generations_per_prompt": 64, "start_percentile": 0.9, "end_percentile": 0.95}
    run("RFT", tmp_path, method=method, **changes)
    rewards = [line["reward/mean"] for line in metrics(tmp_path) if "reward/mean" in line]
    assert rewards[-1] > rewards[0] + 0.3


def test_without_reward_fn_or_with_another_method_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="needs reward_fn|learns online"):
        trlx.train(config=tiny_config(tmp_path, "RFT"), samples=["abc"])
    config = tiny_config(tmp_path, "SFT", train={"trainer": "AccelerateRFTTrainer"})
    with pytest.raises(ValueError, match="needs method.name RFTConfig"):
        trlx.train(config=config, reward_fn=share_of_a, prompts=PROMPTS)
