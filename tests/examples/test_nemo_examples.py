"""Examples on tensor and pipeline parallelism, and models that move between the backends."""

import argparse

import pytest

from examples.megatron import add_backend, backend, inference_config, nemo_arguments, nemo_config
from tests.examples.nemo_jobs import QUICK, cross, llama_and_speed, sample_examples, train_examples
from tests.processes import together
from trlx.launch.convert import convert


@pytest.mark.distributed
def test_examples_train_in_one_process_and_what_they_leave_speaks_in_two(tmp_path):
    together(1, train_examples, tmp_path, ["sft", "ppo"], {})
    together(2, train_examples, tmp_path, ["ilql"], {"tensor_model_parallel_size": 2})
    exported, archive = tmp_path / "ilql" / "checkpoint_1" / "hf_model", tmp_path / "ilql.nemo"
    convert(exported, archive, tensor=2)
    layout = {"pipeline_model_parallel_size": 2}
    together(2, sample_examples, tmp_path / "ppo" / "checkpoint_1", archive, exported, layout)


@pytest.mark.distributed
def test_llama_is_converted_and_trained_and_speed_is_measured(tmp_path):
    together(1, llama_and_speed, tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize(("first", "then"), [("accelerate", "megatron"), ("megatron", "accelerate")])
def test_a_model_taught_on_one_backend_goes_on_to_be_improved_on_the_other(tmp_path, first, then):
    together(2, cross, tmp_path, first, then)


def test_the_command_line_says_how_a_model_is_divided():
    given = nemo_arguments("", ["--model", "m", "--tp", "4", "--sp", "--preset", "megatron_20b", "train.seed=7"])
    assert given["preset"] == "megatron_20b"
    config = nemo_config("ppo", given["preset"], given["hparams"])
    assert config.train.trainer == "NeMoPPOTrainer"
    assert config.train.seed == 7
    kwargs = config.train.trainer_kwargs
    assert (kwargs["tensor_model_parallel_size"], kwargs["sequence_parallel"]) == (4, True)
    assert (kwargs["pretrained_model"], kwargs["megatron_cfg"]["model"]["num_layers"]) == ("m", 44)
    assert "pipeline_model_parallel_size" not in kwargs


def test_a_preset_looks_for_its_model_in_a_folder_of_its_name_and_tiny_needs_none():
    config = nemo_config("sft", "megatron_2b", None)
    assert config.train.trainer_kwargs["pretrained_model"] == "ckpts/megatron_2b"
    tiny = nemo_config("sft", "megatron_2b", QUICK)
    assert tiny.model.model_path.model_type == "gpt2"
    assert tiny.train.trainer_kwargs == {"pretrained_model": None, "megatron_cfg": None}


def test_inference_takes_the_best_checkpoint_unless_another_model_is_named():
    assert inference_config("sft", None).model.model_path == "ckpts/best_checkpoint"
    named = inference_config("sft", {"model.model_path": "m", "tokenizer.tokenizer_path": "gpt2"})
    assert (named.model.model_path, named.tokenizer.tokenizer_path) == ("m", "gpt2")


def test_a_layout_is_for_the_backend_that_has_one():
    parser = argparse.ArgumentParser()
    add_backend(parser)
    assert backend(parser.parse_args(["--backend", "megatron", "--tp", "2", "--pp", "2", "--sp"]), "ILQL") == {
        "train.trainer": "NeMoILQLTrainer",
        "train.trainer_kwargs.tensor_model_parallel_size": 2,
        "train.trainer_kwargs.pipeline_model_parallel_size": 2,
        "train.trainer_kwargs.sequence_parallel": True,
    }
    assert backend(parser.parse_args([]), "ILQL") == {}
    with pytest.raises(ValueError, match="add --backend megatron"):
        backend(parser.parse_args(["--tp", "2"]), "ILQL")
