"""Each mistake gets one clear sentence, before the first update."""

import math

import pytest

import trlx
from tests.builders import char_tokenizer
from tests.runs import DATA, LABELS, PAIRS, PROMPTS, TEXTS, share_of_a, tiny_config
from trlx.api import trainers
from trlx.rewards.scoring import RewardError
from trlx.strict import ConfigError


def train(tmp_path, method="PPO", changes=None, **arguments):
    config = tiny_config(tmp_path, method, **{"train": {"total_steps": 1}, **(changes or {})})
    data = {"reward_fn": share_of_a, "prompts": PROMPTS} if method == "PPO" else {"samples": TEXTS}
    return trlx.train(**{"config": config, **data, **arguments})


@pytest.mark.parametrize(
    ("reward_fn", "words"),
    [
        (lambda outputs, **kw: [1.0], "returned 1 entries for 4 samples"),
        (lambda outputs, **kw: [math.nan] * len(outputs), "nan"),
        (lambda outputs, **kw: [math.inf] * len(outputs), "inf"),
        (lambda outputs, **kw: ["good"] * len(outputs), "good"),
        (lambda outputs, **kw: None, "None"),
        (lambda outputs, **kw: [[1.0] * 99 for _ in outputs], "99"),
        (lambda outputs, **kw: 1 / 0, "ZeroDivisionError"),
        (lambda samples, prompts: [], "returned 0 entries"),
    ],
)
def test_a_reward_that_is_not_one_number_per_sample_is_refused(tmp_path, reward_fn, words):
    with pytest.raises(RewardError, match=words):
        train(tmp_path, reward_fn=reward_fn)


def test_a_reward_that_takes_too_long_stops_the_run(tmp_path):
    import time

    def slow(outputs, **kwargs):
        time.sleep(1)
        return [0.0] * len(outputs)

    with pytest.raises(RewardError, match="reward_timeout"):
        train(tmp_path, reward_fn=slow, changes={"train": {"total_steps": 1, "reward_timeout": 0.05}})


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("PPO", {"prompts": []}, "list of prompts is empty"),
        ("PPO", {"prompts": ["ab", ""]}, "Prompt 1 has no tokens"),
        ("PPO", {"prompts": ["ab", 3]}, "Prompt 1 must be a text"),
        ("PPO", {"prompts": [[4], [38]]}, "Prompt 1 has the token 38, but the model knows 38 tokens"),
        ("SFT", {"eval_prompts": [[99]]}, "Prompt 0 has the token 99, but the model knows 38 tokens"),
        ("PPO", {"prompts": [{"text": "ab"}]}, 'Prompt 0 is a dict without the key "prompt"'),
        ("PPO", {"samples": TEXTS}, "leave out samples and rewards"),
        ("PPO", {"rewards": [1.0]}, "leave out samples and rewards"),
        ("PPO", {"reward_fn": None}, "needs reward_fn"),
        ("SFT", {"samples": []}, "list of samples is empty"),
        ("SFT", {"samples": [["a", "b", "c"]]}, "Sample 0 has 3 texts"),
        ("SFT", {"samples": None}, "needs reward_fn"),
        ("SFT", {"rewards": [1.0]}, "8 samples but 1 rewards"),
        ("SFT", {"samples": LABELS + PAIRS, "config": {}}, "Sample 7 has the keys .* rejected, but sample 0 .* label:"),
        (
            "SFT",
            {"samples": ["ab", *LABELS], "config": {}},
            "Sample 1 has the keys .* but sample 0 has no keys: give all",
        ),
        ("SFT", {"samples": PAIRS}, "knows no way .* this is a pair: write config='dpo'"),
        ("KTO", {"samples": PAIRS}, "Sample 0 must have .* and label, got .*; this is a pair: write config='dpo'"),
        ("DPO", {"samples": LABELS}, "got .*; this is an answer with a label: write config='kto'"),
        ("SFT", {"eval_samples": []}, "eval_samples: The list of samples is empty"),
        ("DPO", {"samples": PAIRS, "eval_samples": LABELS}, "eval_samples: Sample 0 must have prompt and chosen"),
    ],
)
def test_wrong_data_is_refused(tmp_path, method, arguments, words):
    with pytest.raises((ValueError, TypeError), match=words):
        train(tmp_path, method, **arguments)
    assert not any(tmp_path.iterdir())  # the run has not begun


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"trainer": "AccelerateTrainer"}}, "Unknown trainer 'AccelerateTrainer'. Did you mean"),
        ({"train": {"pipeline": "Promptpipelin"}}, "Unknown pipeline"),
        ({"train": {"seq_length": 6}}, "leaves no room for a prompt"),
        ({"method": {"gen_experience_kwargs": {"max_new_tokens": 16}}}, r"no room for a prompt: .*gen_kwargs \(16\)"),
        (
            {"optimizer": {"kwargs": {"learning_rate": 1.0}}},
            "Unknown key 'optimizer.kwargs.learning_rate': write optimizer.kwargs.lr instead",
        ),
        ({"optimizer": {"kwargs": {"lrr": 1.0}}}, "Unknown key 'optimizer.kwargs.lrr'. Did you mean 'lr'"),
        ({"optimizer": {"kwargs": {"lr": "x"}}}, "optimizer.kwargs.lr must be a number of at least 0, got 'x'"),
        ({"optimizer": {"kwargs": {"betas": 1}}}, "optimizer.kwargs do not fit"),
        ({"scheduler": {"kwargs": {"eta": 1.0}}}, "Unknown key 'scheduler.kwargs.eta'. Did you mean 'eta_min'"),
        (
            {"scheduler": {"name": "linear"}},
            "'linear' does not take T_max and eta_min.*write scheduler.kwargs.T_max: null",
        ),
        ({"train": {"offload_optimizer": True}}, "train.offload_optimizer needs a GPU"),
        ({"train": {"compile": True, "packing": "on"}}, "train.packing must be auto or off with train.compile"),
        ({"train": {"gradient_checkpointing": "some"}}, "train.gradient_checkpointing: unknown value 'some'"),
        ({"model": {"num_layers_unfrozen": 9}}, "num_layers_unfrozen.*9|9.*2"),
        ({"method": {"gen_kwargs": {"temperature": [1.0, 2.0]}}}, "temperature"),
        ({"method": {"gen_kwargs": {"max_new_tokens": 0}}}, "max_new_tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path, changes=changes)


def test_what_offline_training_ignores_is_told(tmp_path, caplog):
    train(tmp_path, "SFT", {"train": {"total_steps": 0}}, samples=LABELS, prompts=PROMPTS)
    assert "AccelerateSFTTrainer learns from samples and ignores prompts: write eval_prompts=" in caplog.text
    assert "ignores the label of samples: write config='kto' to learn from it" in caplog.text


def test_sft_with_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Nothing trains"):
        train(tmp_path, "SFT", changes={"model": {"num_layers_unfrozen": 0}})


def test_a_tokenizer_without_eos_is_refused_and_one_without_pad_is_not(tmp_path):
    with pytest.raises(ValueError, match="eos"):
        train(tmp_path, changes={"tokenizer": {"tokenizer_path": char_tokenizer(eos=False)}})
    trainer = train(
        tmp_path, changes={"tokenizer": {"tokenizer_path": char_tokenizer(pad=False)}, "train": {"total_steps": 1}}
    )
    assert trainer.tokenizer.pad_token_id == trainer.tokenizer.eos_token_id


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    wide = char_tokenizer()
    wide.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(ValueError, match="pad_token '<padding>' has id 38, but the model has embeddings for 38"):
        train(tmp_path, changes={"tokenizer": {"tokenizer_path": wide}})


def test_prompts_that_are_too_long_are_cut_with_one_warning(tmp_path, caplog):
    train(tmp_path, prompts=["abcdefgh" * 3, "a"])
    assert sum("10" in record.message and "train.seq_length" in record.message for record in caplog.records) >= 1


def test_method_and_trainer_that_do_not_fit_are_refused(tmp_path):
    config = tiny_config(tmp_path, "SFT", train={"trainer": "AcceleratePPOTrainer"})
    with pytest.raises(ValueError, match="needs method.name PPOConfig"):
        trlx.train(config=config, reward_fn=share_of_a, prompts=PROMPTS)


@pytest.mark.parametrize(
    ("algorithm", "method", "train", "words"),
    [
        ("SFT", {"gen_kwargs": {"temprature": 1.0}}, {}, "Unknown key 'method.gen_kwargs.temprature'. Did you mean"),
        (
            "PPO",
            {"gen_experience_kwargs": {"max_new_tokens": 6, "topk": 1}},
            {},
            "'method.gen_experience_kwargs.topk'. Did you mean 'top_k'",
        ),
        ("PPO", {"gen_kwargs": {"temperature": 0}}, {}, "method.gen_kwargs asks for the likeliest token always"),
        ("PPO", {"gen_experience_kwargs": {"do_sample": False}}, {}, "method.gen_experience_kwargs asks for the likel"),
        ("RFT", {"gen_kwargs": {"num_beams": 2}}, {}, "method.gen_kwargs.num_beams searches"),
        ("PPO", {"gen_kwargs": {"beta": 1}}, {}, "method.gen_kwargs.beta is 1, but only ILQL has the Q"),
        (
            "PPO",
            {"gen_experience_kwargs": {"max_new_tokens": 6, "beta": 1}},
            {},
            "gen_experience_kwargs.beta is 1, but",
        ),
        ("SFT", {"gen_kwargs": {"early_stopping": "often"}}, {}, "early_stopping"),
        ("ILQL", {}, {"trainer_kwargs": {"logit_mask": [[True]]}}, r"shape \[1, 1\], but the model has 38 tokens"),
    ],
)
def test_generation_settings_are_refused_when_the_trainer_is_built(tmp_path, algorithm, method, train, words):
    config = tiny_config(tmp_path, algorithm, method=method, train=train)
    with pytest.raises(ValueError, match=words):
        trainers.get(config.train.trainer)(config, share_of_a, **config.train.trainer_kwargs)


def test_settings_assigned_one_by_one_are_checked_when_the_trainer_is_built(tmp_path):
    config = tiny_config(tmp_path, "PPO")
    config.method.gen_kwargs["temprature"] = 0.5
    with pytest.raises(ValueError, match="Unknown key 'method.gen_kwargs.temprature'"):
        trlx.train(config=config, **DATA["PPO"])
    del config.method.gen_kwargs["temprature"]
    config.train.minibatch_size = 3
    with pytest.raises(ConfigError, match="train.minibatch_size must divide train.batch_size"):
        trlx.train(config=config, **DATA["PPO"])


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [("PPO", "Unknown key 'train.trainer_kwargs.logit_musk'. Known: none"), ("ILQL", "Did you mean 'logit_mask'")],
)
def test_an_argument_that_the_trainer_does_not_take_is_refused(tmp_path, algorithm, words):
    config = tiny_config(tmp_path, algorithm, train={"trainer_kwargs": {"logit_musk": [[True]]}})
    with pytest.raises(ConfigError, match=words):
        trlx.train(config=config, **DATA[algorithm])


def test_beams_may_search_in_evaluations_while_rollouts_are_drawn(tmp_path):
    beams = {"num_beams": 4, "do_sample": False}
    method = {"gen_kwargs": beams, "gen_experience_kwargs": {"max_new_tokens": 6}}
    trainer = train(tmp_path, changes={"method": method, "train": {"total_steps": 1}})
    model, written, likeliest = trainer.backend.policy.model, [], []
    for text in PROMPTS:
        prompt = trainer.tokenizer([text], return_tensors="pt")
        for found, search in ((written, beams), (likeliest, {"do_sample": False})):
            ids = model.generate(**prompt, **search, max_new_tokens=6)[0, len(text) :]
            found.append(trainer.tokenizer.decode(ids, skip_special_tokens=True))
    rows = trainer.evaluator.run().rows
    assert rows and all(row[1] == written[PROMPTS.index(row[0])] for row in rows)
    assert any(written[i] != likeliest[i] for i in range(len(PROMPTS)))
