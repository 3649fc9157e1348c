"""Scripts and YAML files written for CarperAI's trlx."""

import importlib
import operator
import subprocess
import sys
import warnings

import pytest
import torch

from tests.builders import char_tokenizer
from trlx.compat.functions import (
    DialogMessage,
    DialogStore,
    flatten_dict,
    logprobs_of_labels,
    make_experience,
    set_seed,
    tokenize_dialogue,
    whiten,
)
from trlx.compat.imports import OLD_PATHS
from trlx.config import TRLConfig
from trlx.trainer.accelerate import AcceleratePPOTrainer

PAIRS = [(module, name) for module, names in OLD_PATHS.items() for name in names]


def forget(module: str) -> None:
    """As if the process had not imported it yet."""
    sys.modules.pop(module, None)


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_every_old_name_is_where_the_table_says(module, name):
    new_module, _, attribute = OLD_PATHS[module][name].partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = getattr(importlib.import_module(module), name)
    assert found == operator.attrgetter(attribute)(importlib.import_module(new_module))


SCRIPT_LINES = """
from trlx.data.configs import TRLConfig, ModelConfig, TokenizerConfig, OptimizerConfig, SchedulerConfig, TrainConfig
from trlx.data.default_configs import TRLConfig, PPOConfig, ILQLConfig, SFTConfig, ModelConfig, TrainConfig
from trlx.data.default_configs import default_ppo_config, default_ilql_config, default_sft_config, default_rft_config
from trlx.data.default_configs import default_nemo_1_3b_config, default_nemo_2b_config, default_nemo_20b_config
from trlx.data.method_configs import MethodConfig, register_method, get_method
from trlx.models.modeling_ppo import PPOConfig, AdaptiveKLController, FixedKLController
from trlx.models.modeling_ilql import ILQLConfig
from trlx.trainer.accelerate_ppo_trainer import AcceleratePPOTrainer
from trlx.trainer.accelerate_ilql_trainer import AccelerateILQLTrainer, make_experience
from trlx.trainer.accelerate_sft_trainer import AccelerateSFTTrainer, SFTConfig
from trlx.trainer.accelerate_rft_trainer import AccelerateRFTTrainer, RFTConfig
from trlx.trainer.nemo_ppo_trainer import NeMoPPOTrainer
from trlx.trainer.nemo_ilql_trainer import NeMoILQLTrainer
from trlx.trainer.nemo_sft_trainer import NeMoSFTTrainer
from trlx.pipeline import register_datapipeline
from trlx.pipeline.offline_pipeline import PromptPipeline, DialogMessage, DialogStore, tokenize_dialogue
from trlx.utils.loading import get_trainer, get_pipeline
from trlx.utils import logging
import trlx.utils.logging as logging
from trlx.utils.modeling import RunningMoments, whiten, logprobs_of_labels, flatten_dict
""".strip().splitlines()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("line", SCRIPT_LINES)
def test_a_line_that_scripts_in_the_wild_have_still_works(line):
    exec(line, {})


def test_a_path_warns_once_and_says_where_its_names_are_now():
    forget("trlx.data.configs")
    with pytest.warns(DeprecationWarning) as caught:
        from trlx.data.configs import ModelConfig, TRLConfig  # noqa: F401

        importlib.import_module("trlx.data.configs").TrainConfig  # noqa: B018
    (warning,) = caught
    assert "trlx.data.configs" in str(warning.message)
    assert "ModelConfig is now trlx.config.ModelConfig" in str(warning.message)
    assert warning.filename == __file__


def test_a_second_path_warns_again_and_names_every_new_place():
    forget("trlx.data.default_configs")
    with pytest.warns(
        DeprecationWarning, match=r"trlx\.presets\.default_ppo_config; its other names are in .*trlx\.co"
    ):
        from trlx.data.default_configs import default_ppo_config  # noqa: F401


def test_a_slip_in_an_old_path_is_an_ordinary_import_error():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'trlx\.data\.confgs'"):
        importlib.import_module("trlx.data.confgs")
    with pytest.raises(ImportError, match="cannot import name 'TRLConfg' from 'trlx.data.configs'"):
        from trlx.data.configs import TRLConfg  # noqa: F401


def test_logging_is_one_module_under_both_names():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import trlx.utils.logging as old
        from trlx import logging as new
    assert old.get_logger is new.get_logger
    assert old.INFO == new.INFO


def test_importing_an_old_path_does_not_need_trlx_imported_before():
    code = "from trlx.utils.loading import get_trainer; print(get_trainer('ACCELERATEsftTRAINER').__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "AccelerateSFTTrainer"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trainers_and_pipelines_are_found_in_any_case():
    from trlx.utils.loading import get_pipeline, get_trainer

    assert get_trainer("AcceleratePPOtrainer") is AcceleratePPOTrainer
    assert get_pipeline("promptpipeline").__name__ == "PromptPipeline"
    with pytest.raises(ValueError, match="Did you mean 'AcceleratePPOTrainer'"):
        get_trainer("AcceleratePPOTrainr")


def test_the_default_nemo_configs_are_there():
    assert importlib.import_module("trlx.compat.functions").default_nemo_20b_config().model.hidden_size == 6144


def test_seeds_differ_between_processes(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    set_seed(3)
    drawn = torch.rand(1)
    assert drawn == torch.rand(1, generator=torch.Generator().manual_seed(5))


def test_a_dialogue_becomes_turns_and_eos_joins_the_last():
    # a 4, b 5, c 6; eos 2
    turns = tokenize_dialogue(["a", "bb", "c", "a"], char_tokenizer())
    assert turns == [
        DialogMessage(False, (4,)),
        DialogMessage(True, (5, 5)),
        DialogMessage(False, (6,)),
        DialogMessage(True, (4, 2)),
    ]


def test_a_text_is_an_output_after_bos_and_is_cut_to_length():
    assert tokenize_dialogue("abc", char_tokenizer(), 3) == [DialogMessage(False, (1,)), DialogMessage(True, (4, 5))]


def test_a_dialog_store_labels_outputs_only_and_pads_on_the_left():
    tokenizer = char_tokenizer()
    tokenizer.padding_side = "left"
    store = DialogStore(
        [tokenize_dialogue(sample, tokenizer) for sample in (["a", "b"], ["ab", "c", "a", "b"])], tokenizer
    )
    (batch,) = store.create_loader(2)
    assert batch["input_ids"].tolist() == [[0, 0, 0, 4, 5, 2], [4, 5, 6, 4, 5, 2]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 5, 2], [-100, -100, 6, -100, 5, 2]]


def test_experience_has_normalised_rewards_on_the_last_action():
    # mean 1, unbiased std sqrt(2)
    batch = make_experience([["a", "b"], ["a", "c"]], [0, 2], char_tokenizer()).rows([0, 1])
    assert batch.tokens.tolist() == [[4, 5, 2], [4, 6, 2]]
    torch.testing.assert_close(batch.scores, torch.tensor([[0, 0, -(0.5**0.5)], [0, 0, 0.5**0.5]]))


def test_whitening_can_keep_the_mean():
    # mean 2, unbiased variance 1
    xs = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(whiten(xs), torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(whiten(xs, shift_mean=False), torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(NotImplementedError, match="this process only"):
        whiten(xs, distributed=True)


def test_logprobs_are_those_of_the_labels():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 3.0**0.5]]])
    expected = torch.tensor([[0.5, 1 / (1 + torch.e ** (3**0.5))]]).log()
    torch.testing.assert_close(logprobs_of_labels(logits, torch.tensor([[1, 0]])), expected)


def test_nested_dicts_become_flat():
    assert flatten_dict({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}


OLD_YAML = """
train:
  seq_length: 64
  epochs: 100 # Train for max(epochs, total_steps)
  total_steps: 1000
  batch_size: 16

  checkpoint_interval: 10000
  eval_interval: 128

  pipeline: "PromptPipeline"
  trainer: "AcceleratePPOTrainer"
  entity_name: null

model:
  model_path: "lvwerra/gpt2-imdb"
  num_layers_unfrozen: 2

tokenizer:
  tokenizer_path: "gpt2"
  truncation_side: "right"

optimizer:
  name: "adamw"
  kwargs:
    lr: 1.412e-4
    betas: [0.9, 0.95]

scheduler:
  name: "cosine_annealing"
  kwargs:
    T_max: 10000
    eta_min: 1.412e-4

method:
  name: "ppoconfig"
  num_rollouts: 128
  chunk_size: 128
  ppo_epochs: 4
  init_kl_coef: 0.2
  target: 6
  horizon: 10000
  gamma: 1
  lam: 0.95
  cliprange: 0.2
  cliprange_value: 0.2
  vf_coef: 1.0
  scale_reward: False
  cliprange_reward: 10
  ref_mean: null
  ref_std: null
  gen_kwargs:
    max_new_tokens: 48
    top_k: 0.0
    top_p: 1.0
    do_sample: True
"""


def test_an_old_yaml_file_loads_with_its_values(tmp_path):
    file = tmp_path / "ppo.yml"
    file.write_text(OLD_YAML)
    config = TRLConfig.load_yaml(file)
    assert type(config.method).__name__ == "PPOConfig"
    assert (config.method.target, config.method.gamma, config.method.scale_reward) == (6.0, 1.0, False)
    assert config.train.entity_name is None
    assert config.optimizer.kwargs == {"lr": 1.412e-4, "betas": [0.9, 0.95]}


def test_an_old_call_of_update_with_a_dict_and_dotted_keys_works():
    with pytest.warns(DeprecationWarning):
        forget("trlx.data.default_configs")
        default = importlib.import_module("trlx.data.default_configs").default_ilql_config
    config = TRLConfig.update(default().to_dict(), {"method.gamma": 0.5, "train": {"seed": 3}})
    assert (config.method.gamma, config.train.seed, config.method.tau) == (0.5, 3, 0.7)


def test_a_trainer_of_ones_own_is_registered_as_in_the_original():
    from trlx.registry import trainers
    from trlx.trainer import register_trainer

    @register_trainer
    class TrainerOfMyOwn:
        pass

    assert trainers.get("trainerofmyown") is TrainerOfMyOwn
