from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from tests.unit.tiny_models import FAMILIES, LAYERS, ragged_batch, tiny_config, tiny_model
from trlx.models.decoder import (
    after_blocks,
    blocks,
    disable_dropout,
    final_norm,
    freeze,
    hidden_size,
    output_head,
    probing,
    state_givers,
    trunk,
)

every_family = pytest.mark.parametrize("name", FAMILIES)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def expected_trainable(name: str, k: int) -> set[str]:
    family, model = FAMILIES[name], tiny_model(name)
    parts = [f"{family.blocks}.{LAYERS - 1 - i}." for i in range(k)]
    parts += [f"{part}." for part in (family.norm, family.head) if part]
    return {weight for weight, _ in model.named_parameters() if weight.startswith(tuple(parts))}


@every_family
def test_the_parts_of_a_model_are_found_where_its_architecture_keeps_them(name):
    model, family = tiny_model(name), FAMILIES[name]
    assert blocks(model) is model.get_submodule(family.blocks)
    assert final_norm(model) is (model.get_submodule(family.norm) if family.norm else None)
    assert output_head(model) is model.get_output_embeddings()
    assert hidden_size(model) == (16 if name == "opt_projected" else 32)


@every_family
@pytest.mark.parametrize("k", [1, 2])
def test_only_the_top_blocks_the_final_norm_and_an_untied_head_train(name, k):
    model = tiny_model(name)
    freeze(model, k)
    assert trainable(model) == expected_trainable(name, k)
    model(ragged_batch()[0], use_cache=False).logits.square().sum().backward()
    assert {weight for weight, value in model.named_parameters() if value.grad is not None} == trainable(model)


def test_all_train_at_minus_one_and_none_at_zero():
    model = tiny_model("llama")
    freeze(model, -1)
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    freeze(model, 0)
    assert trainable(model) == set()


@pytest.mark.parametrize("k", [4, -2])
def test_unfreezing_more_blocks_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=rf"num_layers_unfrozen is {k}, but GPT2LMHeadModel has 3 blocks"):
        freeze(tiny_model(), k)


def test_opt_350m_projects_after_its_blocks_and_keeps_the_projection_frozen():
    model = tiny_model("opt_projected")
    assert after_blocks(model) == [model.model.decoder.project_out]
    freeze(model, 3)
    assert not model.model.decoder.project_out.weight.requires_grad


def test_a_model_without_an_output_head_is_refused_by_name():
    with pytest.raises(ValueError, match="GPT2Model is not supported"):
        output_head(trunk(tiny_model()))


def test_a_model_that_is_its_own_body_is_refused_by_name():
    with pytest.raises(ValueError, match="GPT2Model is not supported: looked for a body"):
        trunk(trunk(tiny_model()))


def test_a_trunk_without_a_list_of_blocks_is_refused_by_name():
    model = tiny_model()
    model.transformer.h = nn.Sequential(*model.transformer.h)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported: looked for an nn.ModuleList"):
        blocks(model)


def test_lists_inside_blocks_and_small_lists_beside_them_are_not_the_blocks():
    model = tiny_model()
    model.transformer.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    for block in model.transformer.h:
        block.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(9))
    assert blocks(model) is model.transformer.h


def test_two_norms_beside_the_blocks_are_refused_because_either_could_be_the_last():
    model = tiny_model()
    model.transformer.other = nn.LayerNorm(32)
    with pytest.raises(ValueError, match="found ln_f, other"):
        final_norm(model)


def test_the_norm_of_the_embeddings_is_not_the_final_one():
    model = BertForMaskedLM(BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    model.bert.encoder.embedding_norm = nn.LayerNorm(8)
    assert final_norm(model) is None


@every_family
def test_without_dropout_training_mode_changes_nothing_and_the_config_keeps_its_probabilities(name):
    config = tiny_config(name)
    probabilities = [key for key, value in vars(config).items() if "drop" in key and isinstance(value, float)]
    for key in probabilities:
        setattr(config, key, 0.5)
    torch.manual_seed(0)
    model, tokens = AutoModelForCausalLM.from_config(config), ragged_batch()[0]
    disable_dropout(model)
    with torch.no_grad():
        assert torch.equal(model.train()(tokens).logits, model.train()(tokens).logits)
        torch.testing.assert_close(model.train()(tokens).logits, model.eval()(tokens).logits, rtol=0, atol=1e-6)
    assert all(getattr(model.config, key) == 0.5 for key in probabilities)


def test_only_probabilities_are_switched_off():
    model = tiny_model()
    model.transformer.dropout_kind = "plain"
    disable_dropout(model)
    assert model.transformer.dropout_kind == "plain"


def test_a_probe_puts_every_module_back_in_its_own_mode():
    model = tiny_model().train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), probing(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_the_last_hidden_state_is_the_trunks_or_where_a_model_goes_past_it_that_of_the_blocks_owner():
    gpt2, opt = tiny_model(), tiny_model("opt")
    assert state_givers(gpt2) == [gpt2.transformer]
    assert state_givers(opt) == [opt.model.decoder, opt.model]
