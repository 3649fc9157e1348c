"""Two processes give what one gives with twice the batch; an error on one is an error on both."""

import json
import os

import pytest
import torch

from tests.builders import char_tokenizer, tiny_gpt2, tiny_gpt2_config
from tests.processes import together
from tests.runs import PROMPTS, metrics, run, share_of_a, tiny_config, weights
from tests.unit.test_units import EXPECTED_OF_SIX, gradients_of_six
from tests.vllm_server import StandIn

pytestmark = pytest.mark.distributed

GREEDY = {"gen_kwargs": {"top_k": 1}}
"""Each process draws its own random numbers, so only rollouts without a choice are the same for any number of them."""


CALM = {"kwargs": {"eps": 1e-4}}
"""Adam divides by the size of a gradient: where that is 0 but for rounding (attention's key bias), it trains."""


def close(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < tolerance


NO_DROPOUT = {"model_path": tiny_gpt2_config()}


@pytest.mark.parametrize("minibatch_size", [None, 1])
def test_ppo_on_two_processes_equals_one_with_twice_the_batch(tmp_path, minibatch_size):
    together(
        1, run, "PPO", tmp_path / "one", optimizer=CALM, method={**GREEDY, "chunk_size": 8}, train={"batch_size": 6}
    )
    changes = {"batch_size": 3, "minibatch_size": minibatch_size}
    together(2, run, "PPO", tmp_path / "two", optimizer=CALM, method=GREEDY, train=changes)
    close(weights(tmp_path / "one"), weights(tmp_path / "two"))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        shown = [name for name in mine if name != "padding_percentage"]  # each process trims its own rows
        assert [theirs[name] for name in shown] == pytest.approx([mine[name] for name in shown], abs=1e-4)
    # scores are the same; advantages differ by rounding
    paths = [tmp_path / name / "samples" / "histogram_00000000.jsonl" for name in ("one", "two")]
    mine, theirs = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    assert mine[0] == theirs[0] and sum(mine[0]["counts"]) == 8
    assert sum(mine[1]["counts"]) == sum(theirs[1]["counts"])


def test_a_vllm_server_gives_two_processes_the_samples_of_one(tmp_path):
    server = StandIn(tiny_gpt2(seed=9), char_tokenizer())
    sampler = {"sampler": {"engine": "vllm", "url": server.url}, "total_steps": 4}
    together(
        1, run, "PPO", tmp_path / "one", optimizer=CALM, method={"chunk_size": 8}, train=sampler | {"batch_size": 6}
    )
    together(2, run, "PPO", tmp_path / "two", optimizer=CALM, train=sampler | {"batch_size": 3})
    server.close()
    close(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert max(line.get("rollouts/logprob_gap/max", 0) for line in metrics(tmp_path / "two")) < 1e-5


def test_sft_on_two_processes_equals_one_with_twice_the_batch(tmp_path):
    # 8 samples in batches of 6: the last batch is a short one
    changes = {"model": NO_DROPOUT, "optimizer": CALM}
    together(1, run, "SFT", tmp_path / "one", train={"batch_size": 6}, **changes)
    together(2, run, "SFT", tmp_path / "two", train={"batch_size": 3}, **changes)
    close(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_ilql_on_two_processes_equals_one_with_twice_the_batch(tmp_path):
    # 7 samples in batches of 6: the last batch is a single one
    changes = {"model": NO_DROPOUT, "optimizer": CALM}
    together(1, run, "ILQL", tmp_path / "one", train={"batch_size": 6}, **changes)
    together(2, run, "ILQL", tmp_path / "two", train={"batch_size": 3}, **changes)
    close(weights(tmp_path / "one"), weights(tmp_path / "two"))


@pytest.mark.parametrize("method", ["DPO", "KTO"])
def test_preferences_on_two_processes_equal_one_with_twice_the_batch(tmp_path, method):
    # 7 pairs in batches of 4 rows: each process has a pair, and of the last batch the second one none
    together(1, run, method, tmp_path / "one", train={"batch_size": 4}, optimizer=CALM)
    together(2, run, method, tmp_path / "two", train={"batch_size": 2}, optimizer=CALM)
    close(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_a_reward_model_on_two_processes_equals_one_with_twice_the_batch(tmp_path):
    # 7 pairs in batches of 4 rows, and 3 held-out pairs
    changes = {"model": NO_DROPOUT, "optimizer": CALM}
    together(1, run, "Reward", tmp_path / "one", train={"batch_size": 4}, **changes)
    together(2, run, "Reward", tmp_path / "two", train={"batch_size": 2}, **changes)
    close(weights(tmp_path / "one"), weights(tmp_path / "two"))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line.keys() for line in one] == [line.keys() for line in two] and "eval/accuracy" in one[-1]
    for mine, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(mine, abs=1e-4)


def check_gradients(folder):
    for unit, (gradient, loss) in gradients_of_six(folder).items():
        assert gradient == pytest.approx(EXPECTED_OF_SIX[unit], abs=1e-5), unit
        assert loss == pytest.approx(EXPECTED_OF_SIX[unit] / unit.rows, abs=1e-5), unit


def test_two_processes_divide_a_loss_by_the_units_of_both(tmp_path):
    # three pairs: the second process has one of them, and two rows that only fill up
    together(2, check_gradients, tmp_path)


def run_and_tell(folder, prompts=PROMPTS, **changes):
    """A run of RFT whose processes each write down what they selected last."""
    import trlx

    trainer = trlx.train(config=tiny_config(folder, "RFT", **changes), reward_fn=share_of_a, prompts=prompts)
    rollouts = [[r.prompt, r.response, r.score] for r in trainer._selected().rollouts]
    rank, last = int(os.environ.get("RANK", 0)), trainer.backend.processes - 1
    assert trainer.backend.max_across(torch.tensor([rank, -rank])).tolist() == [last, 0]
    (folder / f"told_{rank}.json").write_text(json.dumps(rollouts))


def test_rft_on_two_processes_equals_one_with_twice_the_batch(tmp_path):
    changes = {"model": NO_DROPOUT, "optimizer": CALM, "method": {**GREEDY, "n_generations_per_prompt": 1}}
    together(1, run_and_tell, tmp_path / "one", train={"batch_size": 6}, **changes)
    together(2, run_and_tell, tmp_path / "two", train={"batch_size": 3}, **changes)
    close(weights(tmp_path / "one"), weights(tmp_path / "two"))
    (alone,) = [json.loads(path.read_text()) for path in (tmp_path / "one").glob("told_*.json")]
    assert told(tmp_path / "two") == [alone, alone]


@pytest.mark.parametrize("reward_on", ["main", "each_rank"])
def test_rft_selects_the_same_on_both_processes_also_where_a_share_is_empty(tmp_path, reward_on):
    # 5 prompts in chunks of 2 x 2: of the last one the second process gets nothing
    method = {"n_generations_per_prompt": 1, "n_improve_steps": 1}
    train = {"batch_size": 2, "reward_on": reward_on}
    together(2, run_and_tell, tmp_path, method=method, train=train, prompts=PROMPTS[:5])
    first, second = told(tmp_path)
    assert first == second and len(first) > 0


@pytest.mark.parametrize("method", ["PPO", "GRPO", "SFT", "ILQL", "RFT", "DPO", "KTO", "Reward"])
def test_two_processes_resume_bit_for_bit(tmp_path, method):
    every = {"checkpoint_interval": 1}
    together(2, run, method, tmp_path / "whole", train=every)
    together(2, run, method, tmp_path / "parts", train={**every, "total_steps": 3})
    together(2, run, method, tmp_path / "parts", train={**every, "resume_from_checkpoint": "auto"})
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all((whole[name] == parts[name]).all() for name in whole)


def wrong_reward(samples, outputs, **kwargs):
    return [1.0]


def fails_on_the_second(samples, outputs, **kwargs):
    if os.environ["RANK"] == "1":
        raise KeyError("no such answer")
    return [0.0] * len(outputs)


def train_and_report(folder, reward_fn, **changes):
    """Writes down what each process was told."""
    import trlx

    try:
        trlx.train(config=tiny_config(folder, "PPO", **changes), reward_fn=reward_fn, prompts=PROMPTS)
        told = "nothing"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    (folder / f"told_{os.environ['RANK']}.json").write_text(json.dumps(told))


def told(folder):
    return [json.loads((folder / f"told_{rank}.json").read_text()) for rank in range(2)]


def test_an_error_in_the_reward_reaches_every_process(tmp_path):
    together(2, train_and_report, tmp_path, wrong_reward)
    first, second = told(tmp_path)
    assert first == second and first.startswith("RewardError") and "1" in first


def in_parts(outputs, ended):
    return {"a": [float(output.count("a")) for output in outputs], "ended": ended}


def test_rewards_can_be_computed_by_each_process(tmp_path):
    (tmp_path / "a").mkdir()
    together(2, train_and_report, tmp_path / "main", in_parts, method=GREEDY)
    together(2, train_and_report, tmp_path / "each", in_parts, method=GREEDY, train={"reward_on": "each_rank"})
    assert metrics(tmp_path / "main") == metrics(tmp_path / "each")
    step = next(line for line in metrics(tmp_path / "each") if "ratio" in line)
    parts = step["rollout_scores/a/mean"] + step["rollout_scores/ended/mean"]
    assert parts == pytest.approx(step["rollout_scores/mean"], abs=1e-6)
    together(2, train_and_report, tmp_path / "a", fails_on_the_second, train={"reward_on": "each_rank"})
    first, second = told(tmp_path / "a")
    assert first == second and "no such answer" in first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"kwargs": {"learning_rate": 1.0}}}, "write optimizer.kwargs.lr instead"),
        ({"train": {"seq_length": 6}}, "leaves no room for a prompt"),
        ({"model": {"num_layers_unfrozen": 9}}, "ValueError"),
    ],
)
def test_bad_settings_are_told_on_every_process(tmp_path, changes, words):
    together(2, train_and_report, tmp_path, share_of_a, **changes)
    assert all(words in message for message in told(tmp_path))
