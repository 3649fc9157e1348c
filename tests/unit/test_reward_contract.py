"""What reward_fn and metric_fn get and may return in whole runs: rollouts and evaluations alike."""

import pytest

import trlx
from tests.builders import tiny_gpt2_config
from tests.runs import PROMPTS, tiny_config
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
