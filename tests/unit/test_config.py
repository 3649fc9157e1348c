"""The configuration is strict at every depth and never shares state with what it was made from."""

import copy
import re
import traceback
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import GPT2Config

from trlx import config
from trlx.compat.settings import HERE
from trlx.config import ModelConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig, TRLConfig
from trlx.method_configs import (
    DPOConfig,
    GRPOConfig,
    MethodConfig,
    PPOConfig,
    RewardConfig,
    RFTConfig,
    get_method,
)
from trlx.model_presets import FOLDER
from trlx.presets import load_preset
from trlx.strict import ConfigError

SECTIONS = (ModelConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig)

MINIMAL = {
    "method": {"name": "PPOConfig"},
    "model": {"model_path": "gpt2"},
    "tokenizer": {"tokenizer_path": "gpt2"},
    "train": {
        "total_steps": 10,
        "seq_length": 32,
        "epochs": 1,
        "batch_size": 4,
        "checkpoint_interval": 5,
        "eval_interval": 5,
        "pipeline": "PromptPipeline",
        "trainer": "AcceleratePPOTrainer",
    },
}


def minimal(**changes) -> TRLConfig:
    return TRLConfig.from_dict(MINIMAL).evolve(**changes)


@pytest.mark.parametrize("method", ["ppo", "ilql", "sft", "rft", "dpo", "kto", "reward"])
def test_every_method_has_a_default_preset(method):
    assert load_preset(method).method.name.lower() == f"{method}config"


def test_a_preset_holds_only_what_differs_from_the_defaults():
    for path in FOLDER.glob("*.yaml"):
        if path.stem.startswith("megatron_") or path.stem == "trlx-2024":  # NeMo's settings; a record of the original's
            continue
        for section, settings in yaml.safe_load(path.read_text()).items():
            kind = get_method(settings["name"]) if section == "method" else config.SECTIONS[section]
            defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(kind)}
            same = {name for name, value in settings.items() if defaults[name] == value}
            assert same <= ({"name"} if section == "method" else set()), f"{path.name}: {section}"


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="Did you mean 'ppo'.*Known:.*ilql"):
        load_preset("ppoo")
    for name, instead in (
        ("dapo", 'load_preset("grpo", overrides=["method.loss_type=dapo"])'),
        ("gspo", 'load_preset("grpo", overrides=["method.loss_type=gspo"])'),
        ("dr_grpo", 'load_preset("grpo", overrides=["method.loss_type=dr_grpo", "method.advantage=dr_grpo"])'),
        ("reinforce++", 'load_preset("reinforce-pp")'),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name!r}: write {instead}")):
            load_preset(name)
    with pytest.raises(ConfigError, match=r"A preset has a name, e.g. load_preset\(\"ppo\"\).evolve"):
        load_preset({"train.seed": 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"gama": 0.9}}, "Unknown key 'method.gama'. Did you mean 'gamma'"),
        ({"methd": {"gamma": 0.9}}, "Unknown section 'methd'. Did you mean 'method'"),
        ({"train": {"sed": 1}}, "Unknown key 'train.sed'. Did you mean 'seed'"),
        ({"train": {"seed": "one"}}, "train.seed must be int, got 'one'"),
        ({"train": {"epochs": True}}, "train.epochs must be int, got True"),
        ({"train": {"batch_size": 0}}, "train.batch_size must be at least 1, got 0"),
        ({"train": {"minibatch_size": 3}}, r"train.minibatch_size must divide train.batch_size \(4\), or null, got 3"),
        ({"method": {"gamma": 1.5}}, "method.gamma must be between 0 and 1"),
        ({"method": {"scale_reward": "runing"}}, "method.scale_reward: unknown value 'runing'. Did you mean 'running'"),
        ({"optimizer": {"name": "adanw"}}, "optimizer.name: unknown value 'adanw'. Did you mean 'adamw'"),
        ({"scheduler": {"name": "cosin"}}, "scheduler.name: unknown value 'cosin'"),
        ({"model": {"num_layers_unfrozen": -2}}, "model.num_layers_unfrozen must be -1"),
        ({"model": {"model_path": 3}}, "model.model_path must be a path, hub name or PretrainedConfig"),
        ({"optimizer": {"kwargs": {"lr": -1e-4}}}, "optimizer.kwargs.lr must be a number of at least 0, got -0.0001"),
        ({"optimizer": {"kwargs": {"lr": "nan"}}}, "optimizer.kwargs.lr must be a number of at least 0, got nan"),
        ({"train": {"tracker": "tensorbord"}}, "Did you mean 'tensorboard'"),
        ({"train": {"tracker": ["wandb", "mlfow"]}}, "train.tracker: unknown value 'mlfow'. Did you mean 'mlflow'"),
        ({"train": {"total_steps": -1}}, "train.total_steps must be at least 0, or null, got -1"),
        ({"train": {"max_grad_norm": 0}}, "train.max_grad_norm must be positive, or null, got 0.0"),
        ({"method": {"lam": float("nan")}}, "method.lam must be between 0 and 1, got nan"),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_write_instead(changes, words):
    with pytest.raises(ConfigError, match=words):
        minimal(**changes)


def test_missing_settings_are_listed():
    without = {**MINIMAL, "train": {"total_steps": 1}}
    with pytest.raises(ConfigError, match="Missing: train.seq_length, train.epochs"):
        TRLConfig.from_dict(without)


def test_a_section_built_in_python_is_checked_too():
    from trlx.method_configs import PPOConfig

    with pytest.raises(ConfigError, match="method.lam must be between 0 and 1"):
        PPOConfig(lam=2.0)


def test_yaml_files_and_overrides_merge_left_to_right(tmp_path):
    (tmp_path / "a.yaml").write_text("method: {gamma: 0.5, lam: 0.5}\ntrain: {seed: 1}\n")
    (tmp_path / "b.yaml").write_text("method: {gamma: 0.6}\ntrain: {tags: [x, y], total_steps: 2e3}\n")
    config = load_preset("ppo", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), overrides=["method.lam=0.75"])
    assert (config.method.gamma, config.method.lam, config.train.seed) == (0.6, 0.75, 1)
    assert config.train.tags == ["x", "y"] and config.train.total_steps == 2000


def test_words_that_yaml_reads_as_truth_values_are_settings_too():
    words = ["mixed_precision=no", "packing=off", "cache_hidden_states=off", "sampler.places=4"]
    train = load_preset("ppo", overrides=[f"train.{word}" for word in words]).train
    assert (train.mixed_precision, train.packing, train.cache_hidden_states) == ("no", "off", "off")
    assert train.sampler == {"places": 4}
    with pytest.raises(ConfigError, match="train.mixed_precision: unknown value True. Known: no, bf16"):
        load_preset("ppo", overrides=["train.mixed_precision=yes"])


def test_a_number_written_as_text_is_a_number():
    kwargs = {"lr": "1e-4", "betas": [0.9, 0.95], "decay": "cosine"}
    config = minimal(optimizer={"kwargs": kwargs}, scheduler={"kwargs": {"eta_min": "1e-6", "T_max": 5}})
    assert config.optimizer.kwargs == kwargs | {"lr": 1e-4} and config.scheduler.kwargs == {"eta_min": 1e-6, "T_max": 5}
    config.optimizer.kwargs["lr"] = "-1"
    with pytest.raises(ConfigError, match="optimizer.kwargs.lr must be a number of at least 0, got -1"):
        config.check()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  seed: [1\n", "mine.yaml, line 3, is not YAML: .*expected"),
        ("- seed\n", "mine.yaml must have sections with settings"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_preset("ppo", tmp_path / "mine.yaml")


def test_an_override_without_a_value_is_refused():
    with pytest.raises(ConfigError, match="section.key=value"):
        load_preset("ppo", overrides=["method.gamma"])


def test_an_override_of_a_section_that_means_nothing_is_refused_where_one_in_a_file_is_ignored():
    with pytest.raises(ConfigError, match="Unknown section 'launcher'"):
        load_preset("ppo", overrides=["launcher.nodes=2"])


def test_to_dict_shares_nothing_with_the_config():
    config = minimal(method={"gen_kwargs": {"eos_token_id": [1, 2]}})
    config.to_dict()["method"]["gen_kwargs"]["eos_token_id"].append(3)
    assert config.method.gen_kwargs["eos_token_id"] == [1, 2]


def test_evolve_merges_nested_dicts_into_a_copy():
    config = minimal()
    changed = config.evolve(method={"gen_kwargs": {"top_k": 5}}, train={"seed": 7})
    assert changed.method.gen_kwargs == {**config.method.gen_kwargs, "top_k": 5}
    assert config.method.gen_kwargs["top_k"] == 0 and config.train.seed == 1000


def test_update_takes_dotted_and_nested_keys_and_leaves_its_base_alone():
    base = minimal()
    changed = TRLConfig.update(base, {"method.gamma": 0.5, "train": {"seed": 3}, "optimizer.kwargs.lr": 0.1})
    assert (changed.method.gamma, changed.train.seed, changed.optimizer.kwargs) == (0.5, 3, {"lr": 0.1})
    assert (base.method.gamma, base.train.seed, base.optimizer.kwargs) == (1.0, 1000, {})


@pytest.mark.parametrize("key", ["method.gama", "seed", "trian.seed"])
def test_update_refuses_unknown_keys_at_every_depth(key):
    with pytest.raises(ConfigError, match="Unknown"):
        TRLConfig.update(minimal(), {key: 0.5})


def test_numbers_written_as_the_other_kind_are_understood():
    assert minimal(method={"gamma": 1}).method.gamma == 1.0
    assert minimal(train={"total_steps": 1e3}).train.total_steps == 1000


def test_a_model_config_object_survives_and_prints():
    config = minimal(model={"model_path": GPT2Config(n_layer=2)})
    assert config.evolve(train={"seed": 2}).model.model_path.n_layer == 2
    assert config.to_json()["model"]["model_path"]["n_layer"] == 2
    assert '"n_layer": 2' in str(config)


def test_attributes_are_as_strict_as_everything_else():
    config = minimal()
    with pytest.raises(ConfigError, match="Unknown key 'train.batchsize'. Did you mean 'batch_size'"):
        config.train.batchsize = 4
    with pytest.raises(ConfigError, match="train.batch_size must be int, got 'x'"):
        config.train.batch_size = "x"
    with pytest.raises(ConfigError, match="Unknown section 'trian'. Did you mean 'train'"):
        config.trian = config.train
    with pytest.raises(ConfigError, match="config.train must be a TrainConfig"):
        config.train = {"seed": 1}
    config.train.seed, config.method.gamma, config.train.tags = np.int64(3), 1, ("a", "b")
    config.train.checkpoint_dir, config.model.num_layers_unfrozen = Path("out"), 2.0
    assert config.to_json()["train"]["seed"] == 3 and type(config.method.gamma) is float
    assert (config.train.tags, config.train.checkpoint_dir, config.model.num_layers_unfrozen) == (["a", "b"], "out", 2)


def test_what_depends_on_two_assignments_is_checked_when_all_are_made():
    config = minimal()
    config.train.minibatch_size = 3
    with pytest.raises(ConfigError, match=r"train.minibatch_size must divide train.batch_size \(4\), or null, got 3"):
        config.check()
    config.train.batch_size = 6
    config.check()
    with pytest.raises(ConfigError, match="for the NeMo trainers: write adamw"):
        config.evolve(optimizer={"name": "fused_adam"})
    config.optimizer.name = "fused_adam"
    with pytest.raises(ConfigError, match="for the NeMo trainers: write adamw"):
        config.check()


def test_a_section_of_ones_own_may_have_attributes_of_its_own():
    @dataclass
    class Mine(MethodConfig):
        strength: float = 1.0

        def __post_init__(self):
            super().__post_init__()
            self.doubled = 2 * self.strength

    mine = copy.deepcopy(Mine(strength=2))
    mine._note, mine.doubled, mine.strength = "free", 5, 3
    assert (mine.doubled, mine.strength, mine._note) == (5, 3.0, "free")
    with pytest.raises(ConfigError, match="Unknown key 'method.strenght'. Did you mean 'strength'"):
        mine.strenght = 1.0
    assert "_sealed" not in vars(minimal().train)


@pytest.mark.parametrize(
    ("key", "here"),
    [
        ("learning_rate", "optimizer.kwargs.lr"),
        ("train.learning_rate", "optimizer.kwargs.lr"),
        ("train.output_dir", "train.checkpoint_dir"),
        ("method.beta", "method.init_kl_coef (PPO)"),
        ("train.epsilon_high", "method.cliprange_high (GRPO)"),
        ("method.max_new_tokens", "method.gen_kwargs.max_new_tokens"),
        ("train.per_device_train_batch_size", "train.batch_size"),
        ("train.bf16", "train.mixed_precision: bf16"),
        ("method.seed", "train.seed"),
        ("seed", "train.seed"),
        ("train.num_layers_unfrozen", "model.num_layers_unfrozen"),
    ],
)
def test_a_name_of_another_library_or_section_is_answered_with_what_to_write(key, here):
    section, _, name = key.rpartition(".")
    changes = {section: {name: 1}} if section else {name: 1}
    written = f"'{re.escape(key)}': write {re.escape(here)} instead"
    for change in (
        lambda: TRLConfig.from_dict(MINIMAL | ({section: {**MINIMAL[section], name: 1}} if section else {name: 1})),
        lambda: minimal(**changes),
        lambda: TRLConfig.update(minimal(), {key: 1}),
        lambda: load_preset("ppo", overrides=[f"{key}=1"]),
        lambda: setattr(getattr(minimal(), section) if section else minimal(), name, 1),
    ):
        with pytest.raises(ConfigError, match=written):
            change()


def test_an_answer_names_the_keys_that_the_method_has_and_else_says_whose_they_are():
    with pytest.raises(ConfigError, match=r"'method.ppo_epochs': write method.num_iterations \(GRPO\) instead"):
        GRPOConfig(name="GRPOConfig").ppo_epochs = 2
    with pytest.raises(ConfigError, match=r"'method.beta', but other methods have method.init_kl_coef \(PPO\) or"):
        RewardConfig(name="RewardConfig").beta = 0.1


def test_every_answer_to_another_librarys_name_is_a_setting_that_exists():
    texts = {"trlx.train", "accelerate"}
    sections = (*SECTIONS, PPOConfig, GRPOConfig, RFTConfig, DPOConfig, RewardConfig)
    known = {f"{cls.section}.{f.name}" for cls in sections for f in fields(cls)}
    for name, here in HERE.items():
        first = re.match(r"\w+(\.\w+)?", here)[0]
        assert first in known | texts, f"{name}: {here}"


def test_an_unknown_section_of_a_file_is_ignored_with_a_warning_and_a_misspelt_one_is_not(caplog, tmp_path):
    config = TRLConfig.from_dict({**MINIMAL, "experiment_notes": {"author": "me"}})
    assert config.to_dict().keys() == MINIMAL.keys() | {"optimizer", "scheduler"}
    assert "'experiment_notes' of the configuration is unknown and ignored" in caplog.text
    (tmp_path / "a.yaml").write_text("trian: {seed: 1}\n")
    with pytest.raises(ConfigError, match="Unknown section 'trian'. Did you mean 'train'"):
        load_preset("ppo", str(tmp_path / "a.yaml"))
    with pytest.raises(ConfigError, match="Unknown section 'experiment_notes'"):
        minimal(experiment_notes={})


def test_no_limit_of_steps_and_no_tags_may_be_written_as_null():
    config = minimal(train={"total_steps": None, "tags": None})
    assert (config.train.total_steps, config.train.tags) == (None, [])


def test_a_negative_kl_coefficient_is_refused():
    with pytest.raises(ConfigError, match="method.init_kl_coef must be at least 0, got -0.1"):
        minimal(method={"init_kl_coef": -0.1})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: minimal().evolve(method={"gama": 1}),
        lambda: TRLConfig.update(minimal(), {"method.gama": 1}),
        lambda: load_preset("ppo", overrides=["method.gama=1"]),
        lambda: TRLConfig.from_dict({}),
    ],
    ids=["evolve", "update", "load_preset", "from_dict"],
)
def test_a_wrong_setting_shows_the_line_that_wrote_it_and_no_frames_of_the_library(wrong, monkeypatch):
    with pytest.raises(ConfigError) as refused:
        wrong()
    assert {entry.filename for entry in traceback.extract_tb(refused.value.__traceback__)} == {__file__}
    monkeypatch.setenv("TRLX_TRACEBACKS", "full")
    with pytest.raises(ConfigError) as refused:
        wrong()
    assert config.__file__ in {entry.filename for entry in traceback.extract_tb(refused.value.__traceback__)}
