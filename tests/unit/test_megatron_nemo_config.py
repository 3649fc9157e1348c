"""`model_config.yaml` of `.nemo` archives: what it says of a model, and what is refused."""

import dataclasses

import pytest
import torch

from tests.unit.nemo_archives import GPT, LLAMA
from tests.unit.test_megatron_families import CONFIGS
from trlx.backends.megatron.families import decoder_config_of
from trlx.backends.megatron.nemo.config import read_config, write_config


@pytest.mark.parametrize(
    "key, value",
    [
        ("headscale", True),
        ("transformer_block_type", "normformer"),
        ("rotary_interleaved", True),
        ("seq_len_interpolation_factor", 2),
        ("num_moe_experts", 8),
        ("mcore_customization_config", {"final_logit_softcapping": 30}),
        ("activation", "squared-relu"),
        ("position_embedding_type", "alibi"),
        ("window_size", [4, 4]),
        ("vocab_size", 7.5),
    ],
)
def test_a_setting_that_would_be_computed_differently_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"m.nemo: .*{key}"):
        read_config(LLAMA | {key: value}, "m.nemo")


def test_shared_keys_in_the_order_of_old_conversions_are_refused():
    with pytest.raises(ValueError, match="num_query_groups must be 4"):
        read_config(LLAMA | {"megatron_legacy": True, "num_query_groups": 2}, "m.nemo")


def test_a_config_that_describes_no_gpt_is_refused():
    with pytest.raises(ValueError, match="must have num_layers, hidden_size, num_attention_heads"):
        read_config({"num_layers": 2}, "m.nemo")


@pytest.mark.parametrize(
    "changes, activation",
    [
        ({"activation": "geglu"}, "gelu"),
        ({"activation": "fast-geglu", "openai_gelu": True}, "gelu_tanh"),
        ({"activation": "geglu", "bias": True, "bias_activation_fusion": True}, "gelu_tanh"),
        ({"activation": "gelu", "bias": True, "bias_activation_fusion": False}, "gelu"),
        ({"activation": "reglu"}, "relu"),
    ],
)
def test_the_form_of_gelu_is_the_one_that_nemo_computed(changes, activation):
    assert read_config(LLAMA | changes, "m.nemo").activation == activation


def test_changes_that_leave_the_weights_win_and_others_are_refused_by_name():
    config = LLAMA | {"hidden_dropout": 0.1}
    found = read_config(config, "m", {"hidden_dropout": 0.3, "layernorm_epsilon": 1e-3, "ffn_hidden_size": None})
    expected = dataclasses.replace(read_config(config, "m"), hidden_dropout=0.3, norm_epsilon=1e-3)
    assert found == expected
    wrong = {"ffn_hidden_size": 16, "normalization": "layernorm1p", "sequence_parallel": True}
    with pytest.raises(
        ValueError, match=r"ffn_hidden_size 16 \(it has 12\), normalization 'layernorm1p' \(it has 'rms"
    ):
        read_config(config, "m", wrong)


def test_learned_positions_cannot_be_changed_but_rotary_ones_can():
    assert read_config(LLAMA, "m", {"max_position_embeddings": 64}).max_position_embeddings == 64
    with pytest.raises(ValueError, match=r"max_position_embeddings 64 \(it has 16\)"):
        read_config(GPT, "m", {"max_position_embeddings": 64})


def test_a_shape_that_nemo_has_no_keys_for_is_not_written():
    decoder = decoder_config_of(CONFIGS["gpt_neox"])
    with pytest.raises(ValueError, match="no keys for its parallel_residual"):
        write_config(decoder, tensor=1, pipeline=1, rows=128, divisor=128, dtype=torch.float32)
