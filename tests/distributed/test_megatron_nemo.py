"""Training starts from `.nemo` archives in any layout, and ends in one where transformers has no such model."""

import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.builders import char_tokenizer, tiny_gpt2_config
from tests.processes import together
from tests.runs import metrics, run
from tests.unit.test_megatron_families import random_model
from trlx.backends.megatron.nemo_weights import open_nemo
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


def trained(folder, algorithm="SFT", steps=2, **trainer_kwargs):
    train = {"trainer": f"NeMo{algorithm}Trainer", "trainer_kwargs": trainer_kwargs, "total_steps": steps}
    return run(algorithm, folder, train=train)


def from_archives(folder: Path) -> None:
    """On two processes: runs from a folder, from archives of three layouts, and with changed settings."""
    sharded = {"tensor_model_parallel_size": 2}
    truth = trained(folder / "truth", pretrained_model=folder / "hf", **sharded).backend.initial_digest
    for name, layout in (
        ("quarters.nemo", sharded),
        ("unpacked", sharded),
        ("one.nemo", {**sharded, "sequence_parallel": True}),
        ("quarters.nemo", {"pipeline_model_parallel_size": 2}),
    ):
        at = folder / f"from-{name}-{len(layout)}-{'pipeline_model_parallel_size' in layout}"
        assert trained(at, pretrained_model=folder / name, **layout).backend.initial_digest == truth
        assert [losses(line) for line in metrics(at)] == [
            pytest.approx(losses(line), abs=1e-6) for line in metrics(folder / "truth")
        ]
    assert metrics(folder / "from-quarters.nemo-1-False") == metrics(folder / "truth")

    changed = {"model": {"hidden_dropout": 0.5, "layernorm_epsilon": 1e-2, "num_layers": 2}}
    backend = trained(folder / "changed", pretrained_model=folder / "one.nemo", megatron_cfg=changed, **sharded).backend
    assert (backend.origin.shape.hidden_dropout, backend.origin.shape.norm_epsilon) == (0.5, 1e-2)
    assert backend.initial_digest == truth
    with pytest.raises(ConfigError, match=r"does not fit the weights in .*one\.nemo: hidden_size 64 \(it has 32\)"):
        trained(folder / "wrong", pretrained_model=folder / "one.nemo", megatron_cfg={"model": {"hidden_size": 64}})


def losses(line: dict) -> dict:
    return {name: value for name, value in line.items() if "loss" in name}


def test_a_run_from_an_archive_is_the_run_from_the_folder_it_was_made_of(tmp_path):
    random_model(tiny_gpt2_config()).save_pretrained(tmp_path / "hf")
    char_tokenizer().save_pretrained(tmp_path / "hf")
    main(["convert", str(tmp_path / "hf"), str(tmp_path / "one.nemo")])
    main(["convert", str(tmp_path / "hf"), str(tmp_path / "quarters.nemo"), "--tensor", "2", "--pipeline", "2"])
    with tarfile.open(tmp_path / "one.nemo") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    together(2, from_archives, tmp_path)


def to_archives(folder: Path) -> None:
    """On two processes: a model of which there is none in transformers is trained, saved and taken up again."""
    file = {"model": SHAPE}
    first = trained(folder / "first", "PPO", 4, megatron_cfg=file, tensor_model_parallel_size=2)
    last = first.backend.weights.digest()
    for layout in ({"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}):
        again = trained(
            folder / f"again-{next(iter(layout))}",
            "PPO",
            1,
            pretrained_model=folder / "first" / "checkpoint_4" / "hf_model" / "model.nemo",
            **layout,
        ).backend
        assert again.initial_digest == last


def test_a_model_that_transformers_has_not_is_saved_as_an_archive_and_taken_up_again(tmp_path):
    together(2, to_archives, tmp_path)
    folder = tmp_path / "first" / "checkpoint_4" / "hf_model"
    names = {file.name for file in folder.iterdir()}
    assert "model.nemo" in names and "tokenizer.json" in names
    assert not {name for name in names if name.endswith(".safetensors") or name.startswith(".")}
    found = open_nemo(folder / "model.nemo")
    assert found.config is None and found.shape.norm_offset == 1.0
    policy = {}
    for file in folder.parent.glob("policy-*.safetensors"):
        policy |= load_file(file)
    assert all(torch.equal(found.source.read(name)[:], policy[name]) for name in found.source.names())
    assert all(torch.equal(found.heads.read(name)[:], policy[name]) for name in found.heads.names())
