"""Presets with NeMo configs, NeMo's names in a config's sections, and scripts written for CarperAI's trlx."""

import pytest
import torch

from tests.unit.megatron_configs import ROOT, read, settings_of
from trlx.api import trainers
from trlx.backends.megatron.settings import ParallelSizes
from trlx.backends.megatron.size_checks import check_sizes
from trlx.compat.functions import default_nemo_1_3b_config
from trlx.config import TRLConfig
from trlx.presets import load_preset
from trlx.strict import ConfigError

SIZES = ("1.3b", "2b", "20b", "65b")
SIZES_OF = {
    "1.3b": (24, 2048, 3072, 16, 2048, (1, 1), (1, 8), 32, 256, None, 6e-5, 5e-5),
    "2b": (24, 2048, 5440, 16, 4096, (1, 1), (1, 1), 32, 256, None, 6e-6, 5e-6),
    "20b": (44, 6144, 24576, 48, 2048, (4, 1), (4, 8), 2, 64, "selective", 6e-5, 5e-5),
    "65b": (80, 8192, 32768, 128, 2048, (8, 4), (16, 8), 8, 128, "selective", 1.1e-4, 1.1e-5),
}
"""Layers, width, feed-forward, heads, length, tensor x pipeline, nodes x GPUs, micro, global, recomputed, rates."""


@pytest.mark.parametrize("size", SIZES)
def test_a_preset_over_a_methods_preset_is_a_whole_configuration(size):
    config = load_preset("ppo", f"megatron_{size}")
    settings, decoder = settings_of(config), settings_of(config).decoder
    sizes, world = settings.sizes, settings.num_nodes * settings.devices
    global_batch = config.train.batch_size * world // (sizes.tensor * sizes.pipeline)
    assert (
        *(decoder.num_layers, decoder.hidden_size, decoder.ffn_hidden_size, decoder.num_attention_heads),
        *(decoder.max_position_embeddings, (sizes.tensor, sizes.pipeline), (settings.num_nodes, settings.devices)),
        *(settings.micro_batch_size, global_batch, settings.recompute.granularity),
        *(settings.optim.lr, settings.optim.schedule.min_lr),
    ) == SIZES_OF[size]
    assert settings.dtype == torch.bfloat16 and settings.optim.distributed
    assert settings.optim.schedule.rate(config.train.total_steps, settings.optim.lr) == settings.optim.schedule.min_lr
    check_sizes(settings, decoder, world, config.train.batch_size)


def test_only_the_2b_model_turns_and_gates():
    shapes = {size: read(f"megatron_{size}").decoder for size in SIZES}
    assert {size for size, decoder in shapes.items() if decoder.position == "rope" and decoder.gated} == {"2b"}
    assert (shapes["2b"].rotary_percentage, shapes["2b"].norm_offset, shapes["2b"].tied) == (0.5, 1.0, False)


@pytest.mark.parametrize("name", ["PPO", "GRPO", "ILQL", "SFT", "DPO", "KTO", "Reward"])
def test_a_preset_takes_the_trainer_of_the_method(name):
    config = TRLConfig.load_yaml(ROOT / f"configs/{name.lower()}.yaml", ROOT / "configs/megatron_20b.yaml")
    assert config.train.trainer == trainers.get(config.train.trainer).__name__ == f"NeMo{name}Trainer"


def test_so_it_does_where_the_method_is_written_in_lower_case():
    assert load_preset("ppo", "megatron_2b", overrides=["method.name=ppoconfig"]).train.trainer == "NeMoPPOTrainer"
    with pytest.raises(ValueError, match="^Unknown method 'Mine'"):
        load_preset("ppo", "megatron_2b", overrides=["method.name=Mine"])


def test_a_preset_alone_says_what_it_goes_over():
    with pytest.raises(ConfigError, match=r'megatron_2b has no method: write load_preset\("ppo", "megatron_2b"\)'):
        load_preset("megatron_2b")
    with pytest.raises(ConfigError, match="megatron_2b.yaml: .*method.name"):
        TRLConfig.load_yaml(ROOT / "configs/megatron_2b.yaml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"optimizer": {"name": "distributed_fused_adam"}},
            "'distributed_fused_adam' is for the NeMo trainers: write ada",
        ),
        (
            {"scheduler": {"name": "CosineAnnealing"}},
            "'cosineannealing' is for the NeMo trainers: write cosine_annealing",
        ),
    ],
)
def test_nemos_names_need_a_nemo_trainer(changes, words):
    with pytest.raises(ConfigError, match=words):
        load_preset("ppo").evolve(**changes)
    load_preset("ppo").evolve(train={"trainer": "nemoPPOtrainer"}, **changes)


def test_a_script_for_the_original_that_changes_the_nemo_config_in_place_is_understood():
    nemo_config = default_nemo_1_3b_config()
    nemo_config.model.num_layers, nemo_config.model.hidden_size = 44, 6144
    nemo_config.model.tensor_model_parallel_size, nemo_config.model.num_attention_heads = 4, 64
    nemo_config.exp_manager.wandb_logger_kwargs.name = "mine"
    kwargs = {"trainer": "NeMoPPOTrainer", "trainer_kwargs": {"megatron_cfg": nemo_config, "pretrained_model": None}}
    optimizer = {"name": "distributed_fused_adam", "kwargs": {"lr": 6.001e-5, "betas": (0.9, 0.95)}}
    config = load_preset("ppo").evolve(train=kwargs, optimizer=optimizer, scheduler={"name": "CosineAnnealing"})
    config.scheduler.kwargs = {"warmup_steps": 0, "constant_steps": 1e12, "min_lr": 6.0e-5}
    settings = settings_of(config)
    assert (settings.decoder.num_layers, settings.decoder.hidden_size, settings.sizes) == (
        44,
        6144,
        ParallelSizes(4, 1, None, True),
    )
    assert settings.optim.schedule.rate(9, 6.001e-5) == 6.0e-5
    assert config.to_json()["train"]["trainer_kwargs"]["megatron_cfg"]["model"]["num_layers"] == 44
