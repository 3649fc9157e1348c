"""Whole runs: what is logged, saved, resumed and refused."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trlx
from tests.builders import char_tokenizer, tiny_gpt2, tiny_gpt2_config
from tests.runs import PROMPTS, TEXTS, length, metrics, run, share_of_a, tiny_config, weights
from trlx import checkpoint
from trlx.backends.accelerate import AccelerateBackend
from trlx.backends.base import Backend
from trlx.methods.units import Unit
from trlx.rewards.scoring import RewardError
from trlx.trainer.accelerate import AccelerateDPOTrainer, AccelerateSFTTrainer
from trlx.trainer.evaluate import EvaluationResult


def same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_before_the_first_update_kl_is_0_and_the_ratio_is_1(tmp_path):
    trainer = run("PPO", tmp_path, train={"total_steps": 2})
    first = next(line for line in metrics(tmp_path) if "ratio" in line)
    assert first["step"] == 1
    assert first["policy/kl"] == 0.0 and first["policy/kl_per_token"] == 0.0 and first["policy/sqrt_kl"] == 0.0
    assert abs(first["ratio"] - 1) < 1e-5 and first["policy/ratio_deviation/max"] < 1e-5
    said = [trainer.backend.evaluate(trainer.store.rows([0]), reference=reference) for reference in (False, True)]
    assert [outputs.values is None for outputs in said] == [False, True]  # the reference has no values


def test_ppo_learns_what_the_reward_asks_for(tmp_path):
    method = {"init_kl_coef": 0.0, "target": None, "scale_reward": None, "num_rollouts": 32, "chunk_size": 32}
    changes = {"train": {"total_steps": 100, "eval_interval": 100}, "optimizer": {"kwargs": {"lr": 1e-2}}}
    run("PPO", tmp_path, method=method, **changes)
    rewards = [line["reward/mean"] for line in metrics(tmp_path) if "reward/mean" in line]
    assert rewards[-1] > rewards[0] + 0.3


def test_sft_learns_its_samples(tmp_path):
    run("SFT", tmp_path, train={"total_steps": 40, "eval_interval": 40})
    losses = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0] - 1.0


COMMON_STATISTICS = "memory/cpu time/forward time/backward learning_rate_group_0"
STATISTICS = {
    "PPO": """
losses/total_loss losses/policy_loss losses/value_loss values/mean values/min values/max values/std values/values_error
values/values_mape_error values/clipfrac old_values/mean old_values/min old_values/max old_values/std returns/mean
returns/min returns/max returns/std policy/approx_kl policy/clipfrac policy/sqrt_kl policy/kl_per_token ratio
policy/entropy padding_percentage rollout_scores/mean rollout_scores/std rollout_scores/running_mean
rollout_scores/running_std kl_ctl_value time/rollout_generate time/rollout_score time/rollout_time""",
    "SFT": "loss",
    "ILQL": """
losses/loss losses/loss_q losses/loss_v losses/loss_cql losses/loss_awac values/mean values/min values/max values/std
qvalues/0/mean qvalues/0/min qvalues/0/max qvalues/0/std qvalues/1/mean qvalues/1/min qvalues/1/max qvalues/1/std
awac_weight/mean awac_weight/min awac_weight/max awac_weight/std""",
    "RFT": """
loss scores_mean len_samples_selected thresholds scores_dist/mean scores_dist/min scores_dist/max scores_dist/std
scores_per_single_prompt/mean samples_per_single_prompt/mean
time/rollout_generate time/rollout_score time/rollout_time""",
}


@pytest.mark.parametrize("method", STATISTICS)
def test_statistics_have_the_names_scripts_know(tmp_path, method):
    import json

    run(method, tmp_path, train={"total_steps": 4})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if "grad_norm" in line)
    assert [name for name in (STATISTICS[method] + " " + COMMON_STATISTICS).split() if name not in step] == []
    evaluations = [line for line in lines if "time/generate" in line]
    assert [line["step"] for line in evaluations] == [0, 4]
    suffix = "@beta=2" if method == "ILQL" else ""
    names = {f"{name}{suffix}" for name in ("metrics/length", "eval/response_length", "eval/ended")}
    assert names | {"time/metric"} <= evaluations[0].keys()
    assert ("reward/mean" in evaluations[0]) == (method in ("PPO", "RFT"))
    path = tmp_path / "samples" / "histogram_00000000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    counted = {row["name"]: sum(row["counts"]) for row in rows}
    tokens = 8 * step.get("rollouts/response_length", 0)
    assert counted == {"PPO": {"scores": 8, "advantages": tokens}, "RFT": {"scores": 32}}.get(method, {})


def test_memory_is_that_of_the_process_that_holds_most(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    held = []
    most = SimpleNamespace(device=torch.device("cuda"), max_across=lambda own: held.extend(own.tolist()) or own * 2)
    found = Backend.memory(most)
    assert held[0] > 0 and found == {"memory/cpu": 2 * held[0], "memory/gpu": 6}


def test_the_saved_folder_loads_in_plain_transformers_with_the_same_logits(tmp_path):
    trainer = run("PPO", tmp_path / "run", train={"total_steps": 2})
    trainer.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("abc", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        # transformers computes GPT-2's GELU in eight operations, trlx in one
        close = {"rtol": 0, "atol": 1e-6}
        torch.testing.assert_close(loaded(ids).logits, trainer.backend.policy.model.eval()(ids).logits, **close)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint_2" / "hf_model")
        assert torch.equal(saved(ids).logits, loaded(ids).logits)


def test_heads_reload_through_trlx(tmp_path):
    trainer = run("PPO", tmp_path / "run", train={"total_steps": 4})
    trainer.save_pretrained(tmp_path / "model")
    again = run("PPO", tmp_path / "again", model={"model_path": str(tmp_path / "model")}, train={"total_steps": 0})
    same(dict(trainer.backend.policy.heads.state_dict()), dict(again.backend.policy.heads.state_dict()))


@pytest.mark.parametrize("method", ["PPO", "GRPO", "SFT", "ILQL", "RFT", "DPO", "KTO"])
@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, method, stop):
    every = {"checkpoint_interval": 1}
    run(method, tmp_path / "whole", train=every)
    run(method, tmp_path / "parts", train={**every, "total_steps": stop})
    run(method, tmp_path / "parts", train={**every, "resume_from_checkpoint": "auto"})
    same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    # the shorter run evaluates at its own last step as well; nothing else may differ
    whole = metrics(tmp_path / "whole")
    assert [line for line in metrics(tmp_path / "parts") if line in whole] == whole


def test_resuming_from_nothing_starts_afresh(tmp_path):
    trainer = run("SFT", tmp_path, train={"total_steps": 1, "resume_from_checkpoint": "auto"})
    assert trainer.schedule.step == 1


def test_a_resume_that_cannot_give_the_same_numbers_says_what_differs(tmp_path, caplog):
    run("SFT", tmp_path, train={"total_steps": 2})
    run("SFT", tmp_path, train={"total_steps": 3, "resume_from_checkpoint": "auto", "seed": 7})
    assert "config.train.seed: 1000 then, 7 now" in caplog.text


def test_a_resume_on_other_samples_or_from_other_first_weights_says_so(tmp_path, caplog):
    model = {"model_path": str(tmp_path / "model")}
    for seed, train in enumerate(({"total_steps": 1}, {"total_steps": 2, "resume_from_checkpoint": "auto"})):
        tiny_gpt2(seed=seed).save_pretrained(tmp_path / "model")
        config = tiny_config(tmp_path / "run", "SFT", model=model, train=train)
        trlx.train(config=config, samples=TEXTS[seed:], eval_prompts=PROMPTS[:1])
    found = re.findall(r"where something has changed\. (\w+): '\w+' then, '\w+' now", caplog.text)
    assert found == ["data", "model"]


def test_evaluations_leave_the_numbers_alone(tmp_path):
    run("PPO", tmp_path / "often", train={"eval_interval": 1})
    run("PPO", tmp_path / "seldom", train={"eval_interval": 100})
    same(weights(tmp_path / "often"), weights(tmp_path / "seldom"))


def test_a_failing_reward_stops_the_run_and_loses_nothing(tmp_path):
    calls = []

    def failing(samples, prompts, outputs, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise ZeroDivisionError("division by zero")
        return share_of_a(samples, prompts, outputs)

    # the second collection fails half way, at a step that has no checkpoint yet
    config = tiny_config(tmp_path / "a", "PPO", train={"checkpoint_interval": 100})
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        trlx.train(config=config, reward_fn=failing, prompts=PROMPTS, metric_fn=length)
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "a"))[0]["schedule"]["step"] == 4
    run("PPO", tmp_path / "a", train={"resume_from_checkpoint": "auto"})
    run("PPO", tmp_path / "whole")
    same(weights(tmp_path / "whole"), weights(tmp_path / "a"))


def test_metadata_reaches_reward_and_metric_and_the_callers_dicts_stay(tmp_path):
    prompts = [{"prompt": text, "number": i} for i, text in enumerate(PROMPTS)]
    seen = {"reward": [], "metric": []}

    def reward(samples, prompts, outputs, tokenizer, number):
        assert [PROMPTS[i] for i in number] == prompts
        assert all(sample.startswith(prompt) for sample, prompt in zip(samples, prompts, strict=True))
        seen["reward"] += number
        return [float(i) for i in number]

    def metric(samples, prompts, outputs, number):
        seen["metric"] += number
        return {"number": number, "constant": 2.5}

    config = tiny_config(tmp_path, "PPO", train={"total_steps": 1})
    trlx.train(config=config, reward_fn=reward, metric_fn=metric, prompts=prompts, eval_prompts=prompts[:3])
    assert prompts[2] == {"prompt": "cab", "number": 2}
    assert seen["metric"] == [0, 1, 2, 0, 1, 2] and set(seen["reward"]) == set(range(8))
    evaluation = metrics(tmp_path)[0]
    assert (evaluation["metrics/number"], evaluation["metrics/constant"], evaluation["reward/mean"]) == (1.0, 2.5, 1.0)


def test_reward_fn_is_told_the_step_of_a_collection_and_of_an_evaluation(tmp_path):
    steps = []

    def reward(outputs, step):
        steps.append(step)
        return [0.0] * len(outputs)

    method = {"num_rollouts": 8, "chunk_size": 8, "ppo_epochs": 1}
    config = tiny_config(tmp_path, "PPO", method=method, train={"total_steps": 3, "eval_interval": 10})
    trlx.train(config=config, reward_fn=reward, prompts=PROMPTS)
    # the first evaluation, a collection for two steps, the next one, and the last evaluation
    assert steps == [0, 0, 2, 3]


def test_a_metric_that_changes_its_tokenizer_changes_no_other(tmp_path):
    def spoiling(samples, tokenizer):
        tokenizer.pad_token_id = 9
        return {"length": [len(sample) for sample in samples]}

    trainer = trlx.train(
        config=tiny_config(tmp_path, "SFT", train={"total_steps": 0}), metric_fn=spoiling, samples=TEXTS
    )
    assert trainer.evaluate() and trainer.tokenizer.pad_token_id == 0


def test_dense_rewards_land_on_their_tokens(tmp_path):
    def dense(samples, prompts, outputs, tokenizer, **kwargs):
        return [[0.5] * len(tokenizer(output)["input_ids"]) for output in outputs]

    method = {"scale_reward": None, "init_kl_coef": 0.0, "gamma": 1.0, "lam": 1.0}
    # without the tokens that leave no text behind, the text has as many characters as the response has tokens
    method["gen_kwargs"] = {"suppress_tokens": [0, 1, 2, 3]}
    config = tiny_config(tmp_path, "PPO", method=method, train={"total_steps": 1})
    trainer = trlx.train(config=config, reward_fn=dense, prompts=PROMPTS)
    batch = trainer.store
    assert torch.equal(batch.scores != 0, batch.response_mask)
    # with gamma and lambda 1 the return of a token is the sum of the rewards from it on
    row, mask = batch.returns[0], batch.response_mask[0]
    count = int(mask.sum())
    assert torch.allclose(row[mask], 0.5 * torch.arange(count, 0, -1.0), atol=1e-5)


def test_stop_sequences_end_responses(tmp_path):
    def reward(samples, outputs, tokenizer, **kwargs):
        assert not any("a" in output or "b" in output for output in outputs)
        return [float(len(output)) for output in outputs]

    config = tiny_config(tmp_path, "PPO", train={"total_steps": 2})
    trainer = trlx.train(config=config, reward_fn=reward, prompts=PROMPTS, stop_sequences=["a", "b"])
    assert trainer.schedule.step == 2


def test_one_list_valued_argument_is_swept_at_evaluation(tmp_path):
    config = tiny_config(
        tmp_path, "PPO", train={"total_steps": 1}, method={"gen_experience_kwargs": {"max_new_tokens": 6}}
    ).evolve(method={"gen_kwargs": {"temperature": [0.5, 1.5]}})
    trainer = trlx.train(config=config, reward_fn=share_of_a, prompts=PROMPTS)
    evaluation = metrics(tmp_path)[0]
    assert {"reward/mean@temperature=0.5", "reward/mean@temperature=1.5"} <= evaluation.keys()
    assert trainer.best_reward is not None and (tmp_path / "best_checkpoint" / "hf_model").is_dir()


@pytest.mark.parametrize("last", [2.0, 3.0], ids=["less", "as much"])
def test_the_best_checkpoint_is_the_one_with_the_highest_reward(tmp_path, last):
    rewards = iter([1.0, 3.0, last])

    def metric(samples, **kwargs):
        return {"reward": next(rewards)}

    config = tiny_config(tmp_path, "SFT", train={"total_steps": 2, "eval_interval": 1})
    trlx.train(config=config, samples=TEXTS, metric_fn=metric)
    state, _ = checkpoint.read_state(checkpoint.existing(tmp_path / "best_checkpoint"))
    assert (state["schedule"]["step"], state["best"][0]) == (1, 3.0)


def test_of_a_sweep_the_best_value_is_the_objective_and_reward_fn_goes_before_a_metric():
    def objective(**means):
        result = EvaluationResult({name.replace("_", "/"): mean for name, mean in means.items()})
        return result.objective(AccelerateDPOTrainer.best_by)

    swept = {"reward_mean@beta=0": 1.0, "reward_mean@beta=1": 3.0, "reward_mean@beta=2": 2.0}
    assert objective(**swept) == ("reward/mean", 3.0) == objective(metrics_reward=5.0, **swept)
    assert objective(eval_accuracy=0.9, metrics_reward=0.5) == ("metrics/reward", 0.5)
    assert objective(metrics_length=5.0) == ("", None) and objective(eval_accuracy=0.9) == ("eval/accuracy", 0.9)


def test_generate_takes_tensors_with_masks_and_returns_prompts_with_responses(tmp_path):
    trainer = run("SFT", tmp_path, train={"total_steps": 1})
    batch = trainer.tokenizer(["abc", "d"], padding=True, return_tensors="pt")
    sequences = trainer.generate(**batch, max_new_tokens=3, do_sample=False)
    alone = trainer.generate([trainer.tokenizer("d")["input_ids"]], max_new_tokens=3, do_sample=False)
    assert sequences.shape[1] <= 6 and sequences[:, :3].tolist() == batch["input_ids"].tolist()
    assert sequences[1, 3:].tolist()[: alone.shape[1] - 1] == alone[0, 1:].tolist()


def test_a_run_keeps_its_settings_beside_its_metrics(tmp_path):
    import json

    run("SFT", tmp_path, train={"total_steps": 1, "seed": 7})
    assert json.loads((tmp_path / "config.json").read_text())["train"]["seed"] == 7


def test_rollouts_are_written_where_asked(tmp_path):
    import json

    (tmp_path / "log").mkdir()
    run("PPO", tmp_path / "run", train={"total_steps": 1, "rollout_logging_dir": str(tmp_path / "log")})
    (folder,) = (tmp_path / "log").glob("run-*")
    (epoch,) = folder.glob("epoch-*.json")
    assert (folder / "config.json").is_file()
    rollouts, decode = json.loads(epoch.read_text()), char_tokenizer().decode
    assert sorted(decode(rollout["query_tensor"]) for rollout in rollouts) == sorted(PROMPTS)
    lines = (tmp_path / "run" / "samples" / "rollout_00000000.jsonl").read_text().splitlines()
    found = [(line["prompt"], line["response"], line["score"]) for line in map(json.loads, lines)]
    assert found == [(decode(r["query_tensor"]), decode(r["response_tensor"]), r["score"]) for r in rollouts]


def test_microbatches_change_nothing(tmp_path):
    # plain SGD, so that weights differ as gradients do: Adam's first step has the same length for every gradient, so it
    # turns a gradient of 1e-9 and one of 2e-9, which are both 0 up to rounding, into steps that differ visibly
    changes = {"optimizer": {"name": "sgd", "kwargs": {"lr": 1.0}}, "scheduler": {"name": "constant", "kwargs": {}}}
    trained = {}
    for steps, size in ((1, 4), (3, 4), (3, 2), (3, 1)):
        folder = tmp_path / f"{steps}_{size}"
        packing = "off" if size == 2 else "on"
        run("PPO", folder, train={"minibatch_size": size, "total_steps": steps, "packing": packing}, **changes)
        trained[steps, size] = weights(folder)
    assert furthest(trained[1, 4], trained[3, 4]) > 0.1
    run("PPO", tmp_path / "tokens", train={"tokens_per_microbatch": 12, "total_steps": 3}, **changes)
    for other in (trained[3, 1], trained[3, 2], weights(tmp_path / "tokens")):
        assert furthest(trained[3, 4], other) < 1e-6


def test_a_loss_is_divided_by_the_number_of_units_that_its_trainer_names(tmp_path, monkeypatch):
    # eight texts of 46 characters in all, and 8 eos
    changes = {"model": {"model_path": tiny_gpt2_config()}, "optimizer": {"kwargs": {"lr": 0.0}}}
    norms = {}
    for unit in Unit:
        monkeypatch.setattr(AccelerateSFTTrainer, "unit", unit)
        run("SFT", tmp_path / unit.name, train={"batch_size": 8, "total_steps": 1}, **changes)
        (norms[unit],) = [line["grad_norm"] for line in metrics(tmp_path / unit.name) if "grad_norm" in line]
    # one sum over 54 tokens, 8 texts or 4 pairs
    assert norms[Unit.SEQUENCE] == pytest.approx(norms[Unit.PAIR] * 4 / 8, rel=1e-5)
    assert norms[Unit.TOKEN] == pytest.approx(norms[Unit.PAIR] * 4 / 54, rel=1e-5)


def furthest(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_steps_with_gradients_that_are_not_finite_change_nothing_and_are_counted(tmp_path):
    trainer = run("SFT", tmp_path, train={"total_steps": 0})
    before = {name: tensor.clone() for name, tensor in trainer.backend.policy.state_dict().items()}

    def broken(scores, batch):
        return scores.logprobs.sum() * float("nan"), {"loss": (torch.tensor(1.0), torch.tensor(1.0))}

    rows = trainer.store.rows([0, 1])

    def step(loss):
        metrics = trainer.guards.train_step(rows, loss)
        trainer.guards.count(metrics)
        return metrics

    totals = [step(broken)["skipped_steps"] for _ in range(24)]
    same(before, dict(trainer.backend.policy.state_dict()))
    assert totals == [*range(1, 25)]
    with pytest.raises(FloatingPointError, match="25 steps in a row"):
        step(broken)
    # a schedule goes on with what was updated: the first step that counts has the first rate, the next one the second
    # of half a cosine over 50 steps, 1e-4 + (3e-3 - 1e-4) * (1 + cos(pi / 50)) / 2
    first, second = step(trainer.loss), step(trainer.loss)
    rates = [first["learning_rate_group_0"], second["learning_rate_group_0"]]
    assert rates == pytest.approx([3e-3, 2.9971388e-3], abs=1e-9)
    assert (second["skipped_steps"], trainer.guards.in_a_row) == (25, 0)
    trainer.backend.policy.model.lm_head.weight.data.fill_(float("nan"))
    for do_sample in (True, False):
        with pytest.raises(FloatingPointError, match="log-probabilities are not finite"):
            trainer.generate("ab", do_sample=do_sample)


def test_a_run_ends_where_no_step_changes_anything(tmp_path, monkeypatch, caplog):
    broken = {"loss": 1.0, "grad_norm": float("nan"), "skipped_steps": 1.0}
    monkeypatch.setattr(AccelerateBackend, "train_step", lambda self, *args: dict(broken))
    with pytest.raises(FloatingPointError, match="25 steps in a row"):
        run("SFT", tmp_path, train={"total_steps": 40, "eval_interval": 100, "checkpoint_interval": 5})
    assert checkpoint.newest(tmp_path) is None and caplog.text.count("no checkpoint is written until") == 1
    assert [line["skipped_steps"] for line in metrics(tmp_path) if "grad_norm" in line] == [*range(1, 25)]


@pytest.mark.parametrize(("method", "setting"), [("PPO", True), ("SFT", "selective"), ("ILQL", "selective")])
def test_gradient_checkpointing_changes_nothing(tmp_path, method, setting):
    no_dropout = {"model_path": tiny_gpt2_config()}
    run(method, tmp_path / "plain", model=no_dropout, train={"total_steps": 3})
    run(method, tmp_path / "recomputed", model=no_dropout, train={"total_steps": 3, "gradient_checkpointing": setting})
    assert furthest(weights(tmp_path / "plain"), weights(tmp_path / "recomputed")) < 1e-6
