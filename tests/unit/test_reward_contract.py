"""What reward_fn and metric_fn get and may return in whole runs: rollouts and evaluations alike."""

import json

import pytest

import trlx
from tests.builders import tiny_gpt2_config
from tests.runs import PROMPTS, metrics, tiny_config
from tests.unit.test_chat import PLAIN, chat, with_template

EOS = 2
ALGORITHMS = pytest.mark.parametrize("algorithm", ["PPO", "RFT"])


def train(folder, algorithm, reward_fn, changes=None, **arguments):
    changes = {"train": {"total_steps": 1}, **(changes or {})}
    arguments = {"prompts": PROMPTS, "eval_prompts": ["hh", "gg"], **arguments}
    return trlx.train(config=tiny_config(folder, algorithm, **changes), reward_fn=reward_fn, **arguments)


def taking_notes(notes):
    """A reward_fn that keeps (is it an evaluation, sample, prompt, output, token ids, whether it ended, step)."""

    def reward(samples, prompts, outputs, output_ids, ended, step):
        for row in zip(samples, prompts, outputs, output_ids, ended, strict=True):
            notes.append((row[1] in ("hh", "gg"), *row, step))
        return [float(i) for i in range(len(samples))]

    return reward


@ALGORITHMS
def test_rollouts_and_evaluations_get_the_same(tmp_path, algorithm):
    notes = []
    train(tmp_path, algorithm, taking_notes(notes), stop_sequences=list("abcdefgh"))
    assert {(evaluation, step) for evaluation, *_, step in notes} == {(False, 0), (True, 0), (True, 1)}
    for _, sample, prompt, output, ids, ended, _ in notes:
        assert sample == prompt + output and "</s>" not in output and not set(output) & set("abcdefgh")
        # a stop sequence is cut off, and an eos stands in its place
        assert ended == (ids[-1] == EOS) and EOS not in ids[:-1] and (ended or len(ids) == 6)
    assert {(evaluation, ended) for evaluation, *_, ended, _ in notes} >= {(False, True), (False, False), (True, True)}


def test_rollouts_are_scored_with_the_step_they_are_drawn_at(tmp_path):
    notes = []
    # 8 rollouts are two passes of two steps
    changes = {"train": {"total_steps": 5, "eval_interval": 100, "checkpoint_interval": 100}}
    train(tmp_path, "PPO", taking_notes(notes), changes)
    assert {step for evaluation, *_, step in notes if not evaluation} == {0, 4}


@ALGORITHMS
def test_with_eos_in_outputs_rollouts_carry_it_where_they_ended_and_evaluations_do_not(tmp_path, algorithm):
    notes = []
    changes = {"train": {"total_steps": 1, "eos_in_outputs": True}}
    train(tmp_path, algorithm, taking_notes(notes), changes, stop_sequences=list("abcdefgh"))
    for evaluation, sample, prompt, output, _, ended, _ in notes:
        assert sample == prompt + output and output.endswith("</s>") == (ended and not evaluation)


@pytest.mark.parametrize("algorithm", ["PPO", "RFT", "SFT"])
def test_functions_get_the_chats_that_prompts_were_written_as(tmp_path, algorithm):
    seen = []

    def reward(messages, prompts, label=None):
        seen.extend(zip(messages, prompts, strict=True))
        return [0.0] * len(prompts)

    tokens = {"model": {"model_path": tiny_gpt2_config(39)}, "tokenizer": {"tokenizer_path": with_template(PLAIN)}}
    changes = {**tokens, "train": {"total_steps": 1, "seq_length": 20}}
    prompts = [chat(text) for text in "abcdefgh"]
    data = {"prompts": prompts} if algorithm != "SFT" else {"samples": ["ab"]}
    metric = {"metric_fn": lambda messages, prompts: {"x": reward(messages, prompts)}}
    train(tmp_path, algorithm, reward, changes, **data, **metric, eval_prompts=[chat("x"), {"prompt": "zz"}][:1])
    assert {(messages[0]["content"], prompt) for messages, prompt in seen} == {
        (text, f"u:{text}\na:") for text in ("x" if algorithm == "SFT" else "xabcdefgh")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reward_fn": lambda outputs, labels: []}, "reward_fn asks for 'labels'.* Did you mean 'label'"),
        ({"metric_fn": lambda outputs, labels: []}, "metric_fn asks for 'labels'"),
        ({"reward_fn": lambda outputs, label: [], "eval_prompts": ["ab"]}, "reward_fn asks for 'label'"),
        ({"reward_fn": lambda outputs, label: [], "prompts": ["ab"]}, "reward_fn asks for 'label'"),
    ],
)
@ALGORITHMS
def test_an_argument_that_nothing_provides_is_named_before_anything_is_sampled(tmp_path, algorithm, arguments, words):
    prompts = [{"prompt": text, "label": 1} for text in PROMPTS]
    arguments = {"prompts": prompts, "eval_prompts": prompts, "reward_fn": lambda outputs: [], **arguments}
    with pytest.raises(ValueError, match=words):
        train(tmp_path, algorithm, **arguments)
    assert not (tmp_path / "metrics.jsonl").exists()


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("algorithm", "reward_on"), [("PPO", "main"), ("PPO", "each_rank"), ("RFT", "main")])
def test_each_part_of_a_reward_is_logged_and_shown_beside_their_sum(tmp_path, algorithm, reward_on):
    async def judge(outputs, output_ids):
        return {"short": [-0.5] * len(outputs), "dense": [[0.25] * len(ids) for ids in output_ids]}

    reward = trlx.WeightedRewards({"judge": (judge, 2.0), "one": (lambda outputs: [1.0] * len(outputs), 3.0)})
    method = {"gen_kwargs": {"min_new_tokens": 6}, **({"scale_reward": None} if algorithm == "PPO" else {})}
    changes = {"train": {"total_steps": 1, "reward_on": reward_on}, "method": method}
    trainer = train(tmp_path, algorithm, reward, changes)
    parts = {"judge/short": -0.5, "judge/dense": 6 * 0.25, "one": 1.0}
    score = 2 * (-0.5 + 1.5) + 3 * 1.0
    first, step, last = metrics(tmp_path)
    for evaluation in (first, last):
        assert {name: evaluation[f"reward/{name}"] for name in [*parts, "mean"]} == {**parts, "mean": score}
    assert {name: step[f"rollout_scores/{name}/mean"] for name in parts} == parts
    assert step["rollout_scores/mean" if algorithm == "PPO" else "scores_mean"] == score
    for sample in lines_of(tmp_path / "samples" / "eval_00000000.jsonl"):
        assert sample["reward"] == score and {name: sample[f"reward/{name}"] for name in parts} == parts
    for sample in lines_of(tmp_path / "samples" / "rollout_00000000.jsonl"):
        assert sample["parts"] == parts
    if algorithm == "PPO":
        # 2 * 0.25 at each of 6 tokens, and what is one number per sample at the last: 2 * -0.5 + 3 * 1.0
        rows = trainer.store.scores[trainer.store.response_mask].view(-1, 6)
        assert rows.unique(dim=0).tolist() == [[0.5] * 5 + [2.5]]
