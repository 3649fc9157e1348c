"""Every example runs offline, with a tiny random model and made data, for one or two steps."""

import importlib
import json
import random
import threading
from unittest.mock import MagicMock

import pytest
import torch
from transformers import GPTJConfig, GPTJForSequenceClassification

import trlx
from examples import arithmetic, published_rewards
from examples.common import arguments, byte_tokenizer, configure
from examples.experiments.grounded_program_synthesis.lang import ProgramError, examples, run
from examples.experiments.grounded_program_synthesis.train_trlx import correctness
from examples.hh import ppo_hh
from examples.hh.serve_reward import server
from examples.hh.task import helpfulness
from examples.ppo_dense_sentiments import halves, place
from examples.summarize_rlhf.reward_model import main as train_reward_model
from examples.summarize_rlhf.reward_model import pairs
from examples.summarize_rlhf.task import with_label
from tests.builders import char_tokenizer
from trlx.strict import ConfigError

PPO = {"method.num_rollouts": 4, "method.chunk_size": 8, "method.ppo_epochs": 1, "method.gen_kwargs.max_new_tokens": 4}
OFFLINE = {"method.gen_kwargs.max_new_tokens": 4}
GRPO = OFFLINE | {"method.num_rollouts": 8, "method.chunk_size": 8}
RFT = {"method.n_generations_per_prompt": 2, "method.gen_kwargs.max_new_tokens": 4}
SAMPLED = {"method.gen_experience_kwargs.max_new_tokens": 4}
SCRIPTS = {
    "arithmetic": GRPO,
    "architext": PPO,
    "simulacra": OFFLINE,
    "ppo_sentiments": PPO,
    "ppo_sentiments_peft": PPO,
    "ppo_sentiments_llama": PPO,
    "ppo_dense_sentiments": PPO,
    "ppo_sentiments_t5": PPO,
    "ilql_sentiments": OFFLINE,
    "ilql_sentiments_t5": OFFLINE,
    "sft_sentiments": OFFLINE,
    "rft_sentiments": RFT,
    "ppo_translation_t5": PPO | SAMPLED,
    "summarize_daily_cnn.t5_summarize_daily_cnn": PPO | SAMPLED,
    "alpaca.sft_alpaca": OFFLINE,
    "hh.ppo_hh": PPO,
    "hh.ilql_hh": OFFLINE,
    "hh.sft_hh": OFFLINE,
    "summarize_rlhf.sft": OFFLINE,
    "summarize_rlhf.trlx_gptj_text_summarization": PPO,
    "summarize_rlhf.ilql_summarize_t5": OFFLINE,
    "experiments.grounded_program_synthesis.train_trlx": PPO,
}
QUICK = {
    "model.model_path": "tiny",
    "train.total_steps": 1,
    "train.batch_size": 4,
    "train.seq_length": 256,
    "train.tracker": None,
    "train.save_best": False,
    "train.save_optimizer": False,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_trains_a_step(script, tmp_path):
    main = importlib.import_module(f"examples.{script}").main
    trainer = main({**QUICK, "train.checkpoint_dir": str(tmp_path), **SCRIPTS[script]}, data="made", reward="made")
    assert trainer.schedule.step == 1
    written = {file.name for file in (tmp_path / "checkpoint_1" / "hf_model").iterdir()}
    assert written & {"config.json", "adapter_config.json"}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert any("time/step" in json.loads(line) for line in lines)


def test_a_setting_that_an_example_does_not_know_is_refused_before_anything_is_loaded():
    for script in SCRIPTS:
        main = importlib.import_module(f"examples.{script}").main
        with pytest.raises(ConfigError, match="Did you mean 'total_steps'"):
            main({"train.total_step": 3}, data="nowhere", reward="nowhere:judge")


def test_the_reward_model_learns_from_pairs_and_can_be_a_reward(tmp_path):
    settings = {"max_steps": 2, "use_cpu": True, "logging_steps": 1, "eval_steps": 2, "disable_tqdm": True}
    trainer = train_reward_model(settings, model="tiny", data="made", out=str(tmp_path))
    assert any("eval_accuracy" in entry for entry in trainer.state.log_history)
    judge = trlx.SequenceClassifierReward(str(tmp_path), device="cpu")
    assert len(judge(["one text", "another"])) == 2


def test_inference_compares_a_model_with_people(tmp_path):
    main = importlib.import_module("examples.summarize_rlhf.trlx_inference_gptj").main
    hparams = {**QUICK, **OFFLINE, "train.checkpoint_dir": str(tmp_path)}
    result = main(hparams, data="made", reward="made")
    assert set(result) == {"overlap", "score_pred", "score_truth"}
    assert len((tmp_path / "summaries.jsonl").read_text().splitlines()) == 8


def test_every_part_can_be_replaced_from_the_command_line(tmp_path):
    given = arguments("", ["--model", "m", "--data", "d.jsonl", "--reward", "a:b", "--out", "o", "method.gamma=0.5"])
    assert given == {
        "hparams": {
            "model.model_path": "m",
            "tokenizer.tokenizer_path": None,
            "train.checkpoint_dir": "o",
            "method": {"gamma": 0.5},
        },
        "data": "d.jsonl",
        "reward": "a:b",
    }
    assert arguments("", ['{"train.seed": 7}'])["hparams"] == {"train.seed": 7}


def test_the_tiny_model_takes_a_few_steps_on_made_data_unless_something_else_is_said():
    given = arguments("", ["--model", "tiny"])
    assert (given["data"], given["reward"], given["hparams"]["train.tracker"]) == ("made", "made", None)
    other = arguments("", ["--model", "tiny", "--data", "default", "train.total_steps=9", "train.tracker=wandb"])
    assert (other["data"], other["reward"]) == ("default", "made")
    for each, steps in ((given, 4), (other, 9)):
        config = configure(trlx.load_preset("ppo"), each["hparams"])
        assert (config.train.total_steps, config.model.model_path.n_layer) == (steps, 2)


def test_the_pupil_learns_from_its_teacher_and_then_from_the_reward(tmp_path, capsys):
    hparams = {**QUICK, **GRPO, "model.model_path": "pupil", "train.checkpoint_dir": str(tmp_path / "run")}
    del hparams["train.seq_length"]
    arithmetic.main(hparams, data="made", lessons=1)
    for folder in ("run_pupil", "run/checkpoint_1/hf_model"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["n_embd"] == 96
    printed = capsys.readouterr().out
    assert "held out\n  step    0  0.0" in printed and "\n  step    1  0.0" in printed


def test_sums_are_worked_out_from_the_right_and_a_teacher_forgets_to_carry():
    draw = random.Random(0)
    assert arithmetic.worked(47, 38, 0.0, draw) == "7+8=15 4+3+1=8 #### 85"
    assert arithmetic.worked(47, 38, 1.0, draw) == "7+8=15 4+3=7 #### 75"
    assert arithmetic.worked(75, 72, 0.0, draw) == "5+2=7 7+7=14 #### 147"
    assert arithmetic.worked(75, 72, 1.0, draw) == "5+2=7 7+7=14 #### 47"
    rows = arithmetic.problems(60, seed=0, digits=1)
    assert len({row["question"] for row in rows}) == 60
    assert all(eval(row["question"]) == int(row["answer"]) for row in rows)
    forgot = [row for row in rows if not row["worked"].endswith(f"#### {row['answer']}")]
    assert 0 < len(forgot) < sum(int(row["answer"]) > 9 for row in rows)


def test_a_model_of_the_hub_gets_an_instruction_the_presets_sizes_and_no_teacher(monkeypatch):
    monkeypatch.setattr(trlx, "train", started := MagicMock())
    arithmetic.main({"model": {"model_path": "Qwen/Qwen2.5-0.5B-Instruct"}, "train.seed": 3})
    (_, given) = started.call_args
    assert started.call_count == 1 and len(given["eval_prompts"]) == 256 and len(given["prompts"]) == 4000
    assert given["prompts"][0]["prompt"][0]["content"].startswith(arithmetic.INSTRUCTION)
    assert len(given["prompts"][0]["prompt"][0]["content"]) == len(arithmetic.INSTRUCTION) + 13
    config = given["config"]
    assert (config.method.gen_kwargs["max_new_tokens"], config.optimizer.kwargs["lr"]) == (256, 1e-6)
    assert (config.method.kl_coef, config.method.loss_type) == (0, "dapo")
    # nor does a teacher show the problems that are held out
    monkeypatch.setattr(arithmetic, "taught", taught := MagicMock(return_value="folder"))
    arithmetic.main(data="made")
    lessons, held_out = taught.call_args.args[:2]
    asked = {row["prompt"][0]["content"] for row in held_out}
    assert len(held_out) == 132 and asked.isdisjoint(row["question"] for row in lessons)


def always_two(samples, **kwargs):
    return [2] * len(samples)


def test_a_file_and_a_function_of_ones_own_are_used(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "only this"}\n')
    main = importlib.import_module("examples.architext").main
    hparams = {**QUICK, **PPO, "train.checkpoint_dir": str(tmp_path)}
    main(hparams, data=str(file), reward=f"{__name__}:always_two")
    (first, *_) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["reward/mean"] == 2
    (sample, *_) = (tmp_path / "samples" / "eval_00000000.jsonl").read_text().splitlines()
    assert json.loads(sample)["prompt"] == "only this"


def test_the_tiny_model_takes_the_kind_that_the_example_has():
    config = trlx.load_preset("ppo").evolve(model={"num_layers_unfrozen": 8})
    assert configure(config, QUICK).model.model_path.model_type == "gpt2"
    assert configure(config, QUICK).model.num_layers_unfrozen == 1
    assert configure(config, {**QUICK, "model.model_arch_type": "seq2seq"}).model.model_path.model_type == "t5"


def test_a_size_of_the_hh_models_changes_what_it_names(monkeypatch):
    monkeypatch.setenv("CONFIG_NAME", "20B")
    config = ppo_hh.ppo_config()
    assert (config.model.model_path, config.train.batch_size, config.method.ppo_epochs) == (
        "EleutherAI/gpt-neox-20b",
        1,
        2,
    )
    assert (config.optimizer.kwargs["lr"], config.optimizer.kwargs["eps"]) == (1e-6, 1e-8)
    assert config.train.checkpoint_dir == "checkpoints/ppo_hh_20B"


def test_helpfulness_is_the_difference_to_the_human_choice():
    # 1 vowel in 2 letters against 1 in 4
    score = helpfulness("made")(samples=["xa"], prompts=["x"], outputs=["a"], original_output=["yay"], tokenizer=None)
    assert score == [0.25]


def test_dense_scores_stand_in_the_middle_and_at_the_end():
    assert halves("Bad. Worse. Good. Fine") == ("Bad. Worse", " Good. Fine")
    assert place(5, 0.25, 0.5) == [0, 0, 0.25, 0, 0.5]
    assert place(1, 0.25, 0.5) == [0.5]


@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("div_n(reverse([-2, -5, -4]),1)", [-4, -5, -2]),
        ("take(sort_asc([3,1,2]),2)", [1, 2]),
        ("drop(sort_des([3,1,2]),1)", [2, 1]),
        ("mul_n(sub_n(add_n([1],5),2),-3)", [-12]),
        ("expand_copy([1, 2])", [1, 2, 1, 2]),
        ("maximum([1, 5, 2])", 5),
    ],
)
def test_programs_are_interpreted(program, value):
    assert run(program) == value


@pytest.mark.parametrize(
    "program",
    [
        "reverse([1, a])",
        "__import__('os').getcwd()",
        "reverse([1]).copy()",
        "[x for x in [1]]",
        "expand_copy(1)",
        "take([1, 2], True)",
        "take([1, 2], 1.5)",
        "div_n([1], 0)",
        "minimum([])",
        "reverse([1], xs=[2])",
        "reverse([1]",
        "",
        "(" * 1500,
        "expand_copy(" * 20 + "[1, 2]" + ")" * 20,
        "[" + "1," * 1000 + "1]",
    ],
)
def test_what_is_no_program_is_refused(program):
    with pytest.raises(ProgramError):
        run(program)


def test_programs_that_examples_come_with_are_right_and_others_are_graded():
    (example,) = examples(1, seed=3)
    assert example.prompt == f"Input: {example.input} Output: {example.output} Function:"
    outputs = [f" {example.program}", " reverse([99])", " import os"]
    assert correctness(outputs, [example.output] * 3) == [1, -0.5, -1]


def test_a_long_post_loses_its_end_but_not_the_cue():
    (row,) = with_label([{"prompt": "POST: abcdefgh\nTL;DR:", "label": " x"}], byte_tokenizer(), 15)
    assert row == {"prompt": "POST: ab\nTL;DR:", "label": " x"}
    # what the tokenizer puts in front takes a place, too
    (row,) = with_label([{"prompt": "abc def\nTL;DR:", "label": " x"}], char_tokenizer(adds_bos=True), 12)
    assert row["prompt"] == "abc \nTL;DR:"


def test_pairs_that_say_the_same_or_little_are_left_out():
    long, other = "one two three four five", "six seven eight nine ten"
    rows = [
        {"prompt": "p", "chosen": long, "rejected": other},
        {"prompt": "p", "chosen": long, "rejected": long},
        {"prompt": "p", "chosen": long, "rejected": "short"},
    ]
    assert pairs(rows) == [{"chosen": f"p\n{long}", "rejected": f"p\n{other}"}]


def test_a_published_reward_model_judges_at_the_end_of_the_text(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [published_rewards.UNUSED]})
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 32}
    config = GPTJConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=None, **shape)
    model = GPTJForSequenceClassification(config)
    tokenizer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    model.score.weight.data.normal_()
    published = tmp_path / "published"
    published.mkdir()
    weights = {name.replace("score.", "v_head."): tensor for name, tensor in model.state_dict().items()}
    torch.save(weights, published / "weights.bin")
    monkeypatch.setattr(published_rewards, "snapshot_download", lambda *a, **k: str(published))

    judge = published_rewards.load_gptj_reward(str(tmp_path / "base"), "some/name", begin="x", end="</s>")
    states = model.eval().transformer(**tokenizer(["xab</s>"], return_tensors="pt"))[0]
    expected = model.score(states[0, -1]).item()
    assert judge(samples=["ab</s>", "abcd"], tokenizer=tokenizer)[0] == pytest.approx(expected, abs=1e-2)  # float16
    del weights["v_head.weight"]
    torch.save(weights, published / "weights.bin")
    with pytest.raises(ValueError, match="has no weights for score.weight"):
        published_rewards.load_gptj_reward(str(tmp_path / "base"), "some/name")


def test_a_reward_server_answers_the_client():
    httpd = server(lambda samples: [len(sample) for sample in samples], port=0, host="127.0.0.1")
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    ask = trlx.RemoteReward(f"http://127.0.0.1:{httpd.server_address[1]}", retries=0)
    try:
        assert ask(samples=["a", "bcd"], prompts=["", ""], outputs=["a", "bcd"]) == [1, 3]
        with pytest.raises(RuntimeError, match="400"):
            ask(samples=[1, 2], prompts=["", ""], outputs=["", ""])
    finally:
        httpd.shutdown()
        httpd.server_close()
