"""Whose tokenizer a run takes: the model's own, unless another one is named."""

import json
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

import trlx
from tests.builders import CHARACTERS, char_tokenizer, tiny_gpt2, tiny_gpt2_config
from tests.runs import PROMPTS, TEXTS, share_of_a, tiny_config
from trlx.config import TokenizerConfig
from trlx.data.hub import no_bars
from trlx.model_presets import FOLDER
from trlx.models.policy import load_model
from trlx.models.source import exported, tokenizer_for
from trlx.strict import ConfigError
from trlx.trainer.accelerate import AccelerateSFTTrainer
from trlx.trainer.nemo import megatron_backend

BACKWARDS = CHARACTERS[::-1]


def saved(folder: Path, characters: str | None = CHARACTERS) -> str:
    """A model, with a tokenizer of these characters unless they are None."""
    tiny_gpt2().save_pretrained(folder)
    if characters is not None:
        char_tokenizer(characters=characters).save_pretrained(folder)
    return str(folder)


def first(tokenizer) -> str:
    """The character with the id 4."""
    return tokenizer.decode([4])


def test_no_preset_names_a_tokenizer():
    for file in FOLDER.glob("*.yaml"):
        assert "tokenizer_path" not in file.read_text(), file.name
    assert trlx.load_preset("ppo", "megatron_20b").tokenizer.tokenizer_path is None


def test_the_tokenizer_is_that_of_the_model_which_train_is_given(tmp_path):
    mine, other = saved(tmp_path / "mine", BACKWARDS), saved(tmp_path / "other")
    seen = []

    def reward(samples, prompts, outputs, **kwargs):
        seen.extend(prompts)
        return share_of_a(samples, prompts, outputs)

    changes = {"model": {"model_path": other}, "tokenizer": {"tokenizer_path": None}, "train": {"total_steps": 0}}
    trainer = trlx.train(mine, reward, prompts=PROMPTS, config=tiny_config(tmp_path / "run", "PPO", **changes))
    assert first(trainer.tokenizer) == BACKWARDS[0] and seen == PROMPTS[:4]


def test_a_checkpoint_is_a_model_with_its_tokenizer(tmp_path):
    mine = saved(tmp_path / "mine", BACKWARDS)
    changes = {"tokenizer": {"tokenizer_path": None}, "train": {"total_steps": 1}}
    trlx.train(mine, samples=TEXTS, config=tiny_config(tmp_path / "run", "SFT", **changes))
    checkpoint = str(tmp_path / "run" / "checkpoint_1")
    changes["train"] = {"total_steps": 0}
    again = trlx.train(checkpoint, samples=TEXTS, config=tiny_config(tmp_path / "again", "SFT", **changes))
    assert first(again.tokenizer) == BACKWARDS[0]
    assert again.config.model.model_path == checkpoint
    assert exported(mine) == mine and exported("gpt2") == "gpt2"
    model_only = tmp_path / "run" / "checkpoint_1" / "hf_model"
    assert exported(checkpoint) == str(model_only)
    (model_only / "model.nemo").touch()
    assert exported(checkpoint) == str(model_only / "model.nemo")


def test_an_adapter_has_the_tokenizer_of_its_model_unless_one_lies_beside_it(tmp_path):
    base, adapter = saved(tmp_path / "base", BACKWARDS), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert first(tokenizer_for(str(adapter), TokenizerConfig())) == BACKWARDS[0]
    char_tokenizer().save_pretrained(adapter)
    assert first(tokenizer_for(str(adapter), TokenizerConfig())) == "a"


def test_where_bars_of_downloads_were_hidden_they_stay_hidden_when_a_model_is_loaded():
    disable_progress_bars()
    try:
        with no_bars():
            assert are_progress_bars_disabled() and not hf_logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() and hf_logging.is_progress_bar_enabled()
    finally:
        enable_progress_bars()
    with no_bars():
        assert not are_progress_bars_disabled() and not hf_logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled() and hf_logging.is_progress_bar_enabled()


def test_an_archive_has_the_tokenizer_beside_it(tmp_path):
    (tmp_path / "model.nemo").touch()
    with pytest.raises(OSError, match="The tokenizer could not be loaded.*write in tokenizer.tokenizer_path"):
        tokenizer_for(str(tmp_path / "model.nemo"), TokenizerConfig())
    char_tokenizer(characters=BACKWARDS).save_pretrained(tmp_path)
    assert first(tokenizer_for(str(tmp_path / "model.nemo"), TokenizerConfig())) == BACKWARDS[0]


def test_a_nemo_trainers_model_is_the_pretrained_one_where_that_is_named(tmp_path):
    config = tiny_config(tmp_path, "SFT", model={"model_path": "gpt2"})
    source = megatron_backend().source
    assert source(config.model, config.train) == "gpt2"
    named = config.evolve(train={"trainer_kwargs": {"pretrained_model": "mine"}})
    assert source(named.model, named.train) == "mine"


def test_an_argument_that_a_nemo_trainer_does_not_take_is_refused(tmp_path):
    kwargs = {"pretrained_modle": "mine"}
    config = tiny_config(tmp_path, "SFT", train={"trainer": "NeMoSFTTrainer", "trainer_kwargs": kwargs})
    with pytest.raises(ConfigError, match="Unknown key 'train.trainer_kwargs.pretrained_modle'. Did you mean 'pretra"):
        trlx.train(config=config, samples=TEXTS)


def test_a_missing_tokenizer_is_called_a_tokenizer_and_what_to_write_is_said(tmp_path):
    # transformers makes a GPT-2 tokenizer with a single token of this folder
    folder = saved(tmp_path / "mine", None)
    assert len(AutoTokenizer.from_pretrained(folder)) == 1
    wanted = "The tokenizer could not be loaded from '.*mine' .*: write in tokenizer.tokenizer_path.* the hub name or"
    config = tiny_config(tmp_path / "run", "SFT", tokenizer={"tokenizer_path": None})
    with pytest.raises(OSError, match=wanted):
        trlx.train(folder, samples=TEXTS, config=config)
    with pytest.raises(OSError, match=wanted):
        tokenizer_for(tiny_gpt2_config(), TokenizerConfig(folder))
    with pytest.raises(ValueError, match="model_path is a config.*write in tokenizer.tokenizer_path"):
        trlx.train(samples=TEXTS, config=config)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "nomodel",
            "No model at 'nomodel', which is model.model_path: there is no such folder, nor a model of that",
        ),
        ("./nope", r"model.model_path is './nope', which does not exist \(seen from /"),
        ("/nope", "model.model_path is '/nope', which does not exist"),
        ("nope.nemo", "model.model_path is 'nope.nemo', which does not exist"),
        ("{}/empty", "No model at '.*/empty', which is model.model_path: the folder has no config.json"),
        ("{}/adapter", "No model at 'nomodel', which is the model of the adapter in .*/adapter: there is no such fol"),
    ],
)
@pytest.mark.parametrize("trainer", ["AccelerateSFTTrainer", "NeMoSFTTrainer"])
def test_a_model_that_is_not_there_is_said_so_in_one_sentence_before_its_tokenizer_is(tmp_path, path, words, trainer):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "nomodel"}')
    config = tiny_config(tmp_path, "SFT", tokenizer={"tokenizer_path": None}, train={"trainer": trainer})
    with pytest.raises(OSError, match=words) as found:
        trlx.train(path.format(tmp_path), samples=TEXTS, config=config)
    assert found.value.__cause__ is None and (found.value.__suppress_context__ or found.value.__context__ is None)


def test_a_pretrained_model_of_a_nemo_trainer_is_named_as_such_and_a_described_one_needs_none(tmp_path):
    backend = megatron_backend()
    train = {"trainer_kwargs": {"pretrained_model": "nomodel", "megatron_cfg": "megatron_20b.yaml"}}
    named = tiny_config(tmp_path, "SFT", model={"model_path": "mine"}, train=train)
    with pytest.raises(OSError, match="No model at 'nomodel', which is train.trainer_kwargs.pretrained_model"):
        backend.check_source(named.model, named.train)
    del named.train.trainer_kwargs["pretrained_model"]
    backend.check_source(named.model, named.train)


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    train = {"total_steps": 1, "checkpoint_dir": "~/run", "logging_dir": "~/logs", "resume_from_checkpoint": "~/run"}
    trainer = trlx.train("~/mine", samples=TEXTS, config=tiny_config("", "SFT", train=train))
    trainer.save("~/saved")
    trainer.load("~/saved")
    trainer.save_pretrained("~/model")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "run", "logs", "saved", "model"}
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file cannot be created .File exists.: name another folder"):
        trainer.save_pretrained("file")


def test_a_model_is_loaded_without_a_bar_of_its_own(tmp_path, capsys):
    folder, _ = saved(tmp_path), capsys.readouterr()
    load_model(folder, {})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tokenizer", [5, char_tokenizer().backend_tokenizer], ids=["number", "tokenizers"])
def test_what_is_no_tokenizer_is_refused_when_the_configuration_is_made(tokenizer):
    words = r"tokenizer.tokenizer_path must be .* by PreTrainedTokenizerFast\(tokenizer_object=...\)\), got "
    with pytest.raises(ConfigError, match=words):
        TokenizerConfig(tokenizer)


def test_a_tokenizer_that_reads_otherwise_than_the_models_own_is_warned_of(tmp_path, caplog):
    folder, other = saved(tmp_path / "mine"), str(tmp_path / "other")
    char_tokenizer(characters=BACKWARDS).save_pretrained(other)
    for named in (other, char_tokenizer(characters=BACKWARDS)):
        caplog.clear()
        assert first(tokenizer_for(folder, TokenizerConfig(named))) == BACKWARDS[0]
        (record,) = caplog.records
        assert record.levelname == "WARNING" and "34 of the model's 38 tokens" in record.message


def test_a_tokenizer_that_reads_as_the_models_own_is_not_talked_about(tmp_path, caplog):
    folder, larger = saved(tmp_path / "mine"), char_tokenizer()
    larger.add_tokens(["<|end|>"])
    for named in (None, folder, char_tokenizer(), larger):
        tokenizer_for(folder, TokenizerConfig(named))
    tokenizer_for(saved(tmp_path / "bare", None), TokenizerConfig(folder))
    tokenizer_for(tiny_gpt2_config(), TokenizerConfig(folder))
    assert not caplog.records


def test_another_name_than_that_of_a_model_on_the_hub_is_mentioned_without_asking_the_hub(tmp_path, caplog):
    folder = saved(tmp_path / "mine")
    tokenizer_for("somebody/else", TokenizerConfig(folder))
    (record,) = caplog.records
    assert f"names the tokenizer {folder}, not that of the model somebody/else" in record.message


def test_the_models_own_tokenizer_is_loaded_as_the_model_is(monkeypatch):
    asked = {}

    def from_pretrained(path, **how):
        asked[path] = how
        return char_tokenizer()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    loading = {"revision": "v2", "dtype": "bfloat16", "trust_remote_code": True}
    tokenizer_for("mine", TokenizerConfig(tokenizer_extra_configs={"use_fast": True}), loading)
    tokenizer_for("mine", TokenizerConfig("other"), loading)
    assert asked == {"mine": {"revision": "v2", "trust_remote_code": True, "use_fast": True}, "other": {}}


def test_a_trainer_loads_the_models_own_tokenizer_as_its_config_says(tmp_path, monkeypatch):
    mine, asked = saved(tmp_path / "mine"), []
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda path, **how: asked.append((path, how)) or char_tokenizer()
    )
    model = {"model_path": mine, "model_extra_configs": {"revision": "v2"}}
    config = tiny_config(tmp_path, "SFT", model=model, tokenizer={"tokenizer_path": None})
    AccelerateSFTTrainer(config=config)
    assert asked == [(mine, {"revision": "v2"})]
