"""Training starts from `.nemo` archives in any layout, and ends in one where transformers has no such model."""

import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.builders import UNPACK, char_tokenizer, tiny_gpt2_config
from tests.distributed.test_megatron_truth import NEEDS, rows, settings
from tests.processes import together
from tests.runs import metrics, run
from tests.unit.test_megatron_families import random_model
from trlx.backends.megatron.nemo.weights import open_nemo
from trlx.launch.cli import main
from trlx.strict import ConfigError

pytestmark = pytest.mark.distributed

SHAPE = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "normalization": "layernorm1p",
    "activation": "fast-swiglu",
    "bias": False,
    "bias_activation_fusion": False,
    "position_embedding_type": "rope",
    "rotary_percentage": 0.5,
    "share_embeddings_and_output_weights": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
"""A small sibling of the preset megatron_2b, for which transformers has no architecture."""


TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


def trained(folder, algorithm, steps, **trainer_kwargs):
    train = {"trainer": f"NeMo{algorithm}Trainer", "trainer_kwargs": trainer_kwargs, "total_steps": steps}
    return run(algorithm, folder, train=train, model={"model_path": "named-in-the-other-file"}).backend


def built(model: Path, **trainer_kwargs):
    from trlx.backends.megatron.backend import MegatronBackend

    return MegatronBackend(**settings("", pretrained_model=model, **trainer_kwargs), needs=NEEDS["SFT"])


def from_archives(folder: Path) -> None:
    """On two processes: models from a folder, from archives in three layouts, and with changed settings."""
    trained(folder / "truth", "SFT", 1, pretrained_model=folder / "hf", **TENSOR)
    trained(folder / "found", "SFT", 1, pretrained_model=folder / "quarters.nemo", **TENSOR)
    assert metrics(folder / "found") == metrics(folder / "truth")

    truth = built(folder / "hf", **TENSOR).evaluate(rows()).logprobs
    assert torch.equal(built(folder / "one.nemo", **TENSOR).evaluate(rows()).logprobs, truth)
    # another layout adds in another order
    for name, layout in (("unpacked", TENSOR | {"sequence_parallel": True}), ("quarters.nemo", PIPELINE)):
        assert float((built(folder / name, **layout).evaluate(rows()).logprobs - truth).abs().max()) < 1e-5

    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    changed = {"model": {**sizes, "hidden_dropout": 0.5, "layernorm_epsilon": 1e-2}}
    backend = built(folder / "one.nemo", megatron_cfg=changed, **TENSOR)
    assert (backend.model_source.decoder.hidden_dropout, backend.model_source.decoder.norm_epsilon) == (0.5, 1e-2)
    assert backend.model_source.config.layer_norm_epsilon == 1e-2
    assert not torch.equal(backend.evaluate(rows()).logprobs, truth)
    with pytest.raises(ConfigError, match=r"does not fit the weights in .*one\.nemo: hidden_size 64 \(it has 32\)"):
        built(folder / "one.nemo", megatron_cfg={"model": sizes | {"hidden_size": 64}})


def test_a_run_from_an_archive_is_the_run_from_the_folder_it_was_made_of(tmp_path):
    random_model(tiny_gpt2_config()).save_pretrained(tmp_path / "hf")
    char_tokenizer().save_pretrained(tmp_path / "hf")
    main(["convert", str(tmp_path / "hf"), str(tmp_path / "one.nemo")])
    main(["convert", str(tmp_path / "hf"), str(tmp_path / "quarters.nemo"), "--tensor", "2", "--pipeline", "2"])
    with tarfile.open(tmp_path / "one.nemo") as tar:
        tar.extractall(tmp_path / "unpacked", **UNPACK)
    together(2, from_archives, tmp_path)


def to_archives(folder: Path) -> None:
    """On two processes: a model of which there is none in transformers is trained, saved and taken up again."""
    first = trained(folder / "first", "PPO", 2, megatron_cfg={"model": SHAPE}, **TENSOR)
    scores = first.evaluate(rows()).logprobs
    for layout in (TENSOR, PIPELINE):
        again = built(folder / "first" / "checkpoint_2" / "hf_model" / "model.nemo", **layout).evaluate(rows())
        assert float((again.logprobs - scores).abs().max()) < 1e-5


def test_a_model_that_transformers_has_not_is_saved_as_an_archive_and_taken_up_again(tmp_path):
    together(2, to_archives, tmp_path)
    folder = tmp_path / "first" / "checkpoint_2" / "hf_model"
    names = {file.name for file in folder.iterdir()}
    assert "model.nemo" in names and "tokenizer.json" in names
    assert not {name for name in names if name.endswith(".safetensors") or name.startswith(".")}
    found = open_nemo(folder / "model.nemo")
    assert found.config is None and found.decoder.norm_offset == 1.0
    policy = {}
    for file in folder.parent.glob("policy-*.safetensors"):
        policy |= load_file(file)
    assert all(torch.equal(found.tensors.read(name)[:], policy[name]) for name in found.tensors.names())
    assert all(torch.equal(found.heads.read(name)[:], policy[name]) for name in found.heads.names())
