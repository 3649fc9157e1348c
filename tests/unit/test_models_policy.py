from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.activations import NewGELUActivation

from tests.unit.tiny_models import FAMILIES, ragged_batch, tiny_config, tiny_model
from trlx.models import packing
from trlx.models.heads import QHeads, ValueBranch, ValueHead
from trlx.models.packing import why_unpackable
from trlx.models.policy import HEADS_FILE, build_policy, load_heads, load_model, save_hf

every_family = pytest.mark.parametrize("name", FAMILIES)


def randomize(module: nn.Module) -> None:
    torch.manual_seed(7)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.3)


@every_family
def test_logprobs_are_those_of_the_whole_models_logits(name):
    model = tiny_model(name)
    tokens, attention_mask, response_mask = ragged_batch()
    with torch.no_grad():
        found = build_policy(model, temperature=0.7)(tokens, attention_mask, response_mask).logprobs
        logits = model(tokens, attention_mask=attention_mask.long()).logits
    expected = (logits[:, :-1] / 0.7).log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    expected = nn.functional.pad(expected, (1, 0)) * response_mask
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32 and (found[~response_mask] == 0).all()


def sharing_batch():
    """(tokens, attention_mask, response_mask): row 1 begins as row 0 does and row 2 goes on from row 1; row 3 is row 1;
    row 4 shares two tokens, and nothing begins like row 5; row 6 shares as many as row 1; all of row 7 begins others.
    """
    rows = [[5, 6, 7, 8, 9], [5, 6, 7, 10], [5, 6, 7, 10, 11, 12], [5, 6, 7, 10], [5, 6, 13, 14], [15, 6, 7, 8]]
    rows += [[5, 6, 7, 11], [5, 6]]
    tokens = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    columns, lengths = torch.arange(6), torch.tensor([[len(row)] for row in rows])
    return tokens, columns < lengths, (columns > 0) & (columns < lengths)


def test_a_beginning_that_rows_share_is_packed_once(monkeypatch):
    monkeypatch.setattr(packing, "SHARED", 3)
    found = packing.packed(*sharing_batch()[:2])
    # width 6: row 1 adds its fourth token, and so does row 6, which therefore follows it; row 2 adds its last two,
    # rows 3 and 7 nothing, and the others everything
    assert found.at.tolist() == [0, 1, 2, 3, 4, 9, 39, 16, 17, 24, 25, 26, 27, 30, 31, 32, 33]
    assert found.rows == [(1, 5, 5), (2, 1, 4), (1, 2, 6), (2, 4, 4)]
    assert found.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 1, 2, 6, 0, 1, 2, 5, 7, 8] + [*range(9, 17)]
    assert found.ends.tolist() == [[0, 5, 6, 7, 9, 13, 17], [0, 5, 9, 13, 19, 23, 27]] and found.longest == (5, 6)
    assert {x.device.type for x in vars(found.to("meta")).values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert found.places.tolist() == [
        [0, 1, 2, 3, 4, 0], [0, 1, 2, 5, 0, 0], [0, 1, 2, 5, 7, 8], [0, 1, 2, 5, 0, 0],
        [9, 10, 11, 12, 0, 0], [13, 14, 15, 16, 0, 0], [0, 1, 2, 6, 0, 0], [0, 1, 0, 0, 0, 0],
    ]  # fmt: skip


PACKED = "gpt2 gpt_neox gpt_bigcode opt opt_projected llama qwen2 qwen3 mixtral phi olmo2 cohere granite".split()


@every_family
def test_packed_rows_have_the_outputs_and_gradients_of_rows_apart_where_the_model_can(name, monkeypatch):
    batch, found = sharing_batch(), []
    monkeypatch.setattr(packing, "SHARED", 3)
    policy = build_policy(tiny_model(name), value_head=True, value_layers=1, dropout=False)
    randomize(policy.value_head.head)
    assert (why_unpackable(policy.architecture) is None) == (name in PACKED)
    for packs, again in ((False, False), (True, False), (True, True))[: 3 if name in PACKED else 0]:
        rows = packing.packed(*batch[:2]) if packs else None
        if again:
            policy.architecture.recompute()
        policy.train().zero_grad()
        outputs = policy(*batch, rows=rows)
        (outputs.logprobs - outputs.values).mean().backward()
        gradients = [weight.grad.clone() for weight in policy.parameters() if weight.grad is not None]
        found.append([outputs.logprobs, outputs.values, *gradients])
    for packed in found[1:]:
        torch.testing.assert_close(packed, found[0], rtol=1e-5, atol=1e-6)


def test_a_window_that_is_longer_than_the_rows_of_the_check_is_seen_in_the_settings():
    for window, reason in ((8, "has attention in a window"), (None, None)):
        policy = build_policy(tiny_model("mistral", sliding_window=window))
        assert why_unpackable(policy.architecture) == reason
    policy.model.config.attention_chunk_size = 8192  # Llama 4
    assert why_unpackable(policy.architecture) == "has attention in a window"


@every_family
def test_garbage_in_the_padding_changes_nothing(name):
    tokens, attention_mask, response_mask = ragged_batch()
    policy = build_policy(tiny_model(name), value_head=True, value_layers=1)
    randomize(policy.heads["value"].head)
    garbage = torch.where(attention_mask, tokens, tokens.flip(0).flip(1))
    with torch.no_grad():
        clean, dirty = policy(tokens, attention_mask, response_mask), policy(garbage, attention_mask, response_mask)
    torch.testing.assert_close(clean.logprobs, dirty.logprobs, rtol=0, atol=1e-6)
    torch.testing.assert_close(clean.values, dirty.values, rtol=0, atol=1e-6)


def test_a_value_is_of_the_state_before_its_token_and_is_zero_elsewhere():
    tokens, attention_mask, response_mask = ragged_batch()
    policy = build_policy(tiny_model("llama"), value_head=True)
    randomize(policy.heads)
    values = policy(tokens, attention_mask, response_mask).values
    states = policy.model.model(tokens)[0]
    row, at = 1, 6
    torch.testing.assert_close(values[row, at], policy.heads["value"](states[row, at - 1]), rtol=0, atol=1e-6)
    assert (values[~response_mask] == 0).all() and (values[response_mask] != 0).all()


def test_values_are_left_out_when_not_asked_for_or_when_there_is_no_head():
    policy = build_policy(tiny_model(), value_head=True, q_heads=2)
    assert policy(*ragged_batch(), values=False).values is None
    assert policy(*ragged_batch(), values=False).q is None
    assert build_policy(tiny_model())(*ragged_batch()).values is None


def test_q_columns_have_one_row_per_head_and_are_zero_outside_responses():
    tokens, attention_mask, response_mask = ragged_batch()
    scores = build_policy(tiny_model(), value_head=True, q_heads=2)(tokens, attention_mask, response_mask)
    for column in (scores.q, scores.target_q, scores.q_logprobs):
        assert column.shape == (2, 3, 9)
        assert (column[:, ~response_mask] == 0).all() and (column[:, response_mask] != 0).all()


def test_the_first_token_of_a_row_cannot_be_scored():
    tokens, attention_mask, response_mask = ragged_batch()
    with pytest.raises(AssertionError, match="no state before it"):
        build_policy(tiny_model())(tokens, attention_mask, torch.ones_like(response_mask))


@pytest.mark.parametrize("value_layers", [0, 2])
@pytest.mark.parametrize("k", [-1, 0, 1])
def test_a_batch_without_response_tokens_still_gives_every_trainable_weight_a_zero_gradient(k, value_layers):
    tokens, attention_mask, response_mask = ragged_batch()
    policy = build_policy(tiny_model("llama"), num_layers_unfrozen=k, value_head=True, value_layers=value_layers)
    scores = policy(tokens, attention_mask, torch.zeros_like(response_mask))
    (scores.logprobs.sum() + scores.values.sum()).backward()
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    assert trained and all(weight.grad is not None and (weight.grad == 0).all() for weight in trained)


def test_a_copy_of_a_policy_scores_with_its_own_weights():
    policy = build_policy(tiny_model("llama"))
    twin = copy.deepcopy(policy)
    before = policy(*ragged_batch()).logprobs
    nn.init.zeros_(policy.model.lm_head.weight)
    assert torch.equal(twin(*ragged_batch()).logprobs, before)


def test_each_head_asked_for_is_built():
    bare = build_policy(tiny_model())
    assert bare.heads is None and bare.value_head is None and bare.q_heads is None
    assert isinstance(build_policy(tiny_model(), value_head=True).heads["value"], ValueHead)
    assert isinstance(build_policy(tiny_model(), value_head=True, value_layers=1).heads["value"], ValueBranch)
    assert isinstance(build_policy(tiny_model(), q_heads=1).heads["q"], QHeads)


def test_without_dropout_a_training_forward_equals_an_evaluation_forward():
    policy = build_policy(tiny_model(resid_pdrop=0.5), value_head=True, value_layers=1, dropout=False)
    randomize(policy.heads["value"].head)
    training, evaluation = policy.train()(*ragged_batch()), policy.eval()(*ragged_batch())
    torch.testing.assert_close(training.logprobs, evaluation.logprobs, rtol=0, atol=1e-6)
    torch.testing.assert_close(training.values, evaluation.values, rtol=0, atol=1e-6)


def test_dropout_stays_on_in_training_unless_switched_off():
    policy = build_policy(tiny_model(resid_pdrop=0.5)).train()
    assert not torch.equal(policy(*ragged_batch()).logprobs, policy(*ragged_batch()).logprobs)


@every_family
def test_an_exported_folder_loads_in_plain_transformers_with_identical_logits(name, tmp_path):
    policy = build_policy(tiny_model(name), value_head=True, dropout=False)
    save_hf(policy, None, tmp_path)
    reloaded, tokens = AutoModelForCausalLM.from_pretrained(tmp_path), ragged_batch()[0]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, policy.model(tokens).logits)


@pytest.mark.parametrize("needs", [{"value_head": True}, {"value_head": True, "value_layers": 2}, {"q_heads": 2}])
def test_heads_come_back_from_an_exported_folder(needs, tmp_path):
    policy = build_policy(tiny_model(), **needs)
    randomize(policy.heads)
    save_hf(policy, None, tmp_path)
    again = build_policy(load_model(tmp_path, {}), **needs)
    load_heads(again, tmp_path)
    for name, weight in policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_an_export_holds_the_tokenizer_and_the_dropout_the_model_came_with_and_no_heads_it_has_not(tmp_path):
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    policy = build_policy(tiny_model(resid_pdrop=0.25), dropout=False)
    save_hf(policy, PreTrainedTokenizerFast(tokenizer_object=words), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("b") == 1
    assert json.loads((tmp_path / "config.json").read_text())["resid_pdrop"] == 0.25
    assert not (tmp_path / HEADS_FILE).exists()


def test_new_heads_stay_as_they_are_where_a_folder_holds_none(tmp_path):
    save_hf(build_policy(tiny_model()), None, tmp_path)
    policy = build_policy(tiny_model(), value_head=True)
    before = copy.deepcopy(policy.heads.state_dict())
    load_heads(policy, tmp_path)
    load_heads(policy, "a-name-on-the-hub")
    assert all(torch.equal(policy.heads.state_dict()[name], weight) for name, weight in before.items())


def test_heads_in_a_folder_are_ignored_by_a_model_without_heads(tmp_path):
    save_hf(build_policy(tiny_model(), value_head=True), None, tmp_path)
    load_heads(build_policy(tiny_model()), tmp_path)


def test_the_heads_that_fit_are_taken_and_the_others_named(tmp_path, caplog):
    ilql = build_policy(tiny_model(), value_head=True, q_heads=2)
    randomize(ilql.heads)
    save_hf(ilql, None, tmp_path / "ilql")
    ppo = build_policy(tiny_model(), value_head=True)
    with caplog.at_level(logging.INFO):
        load_heads(ppo, tmp_path / "ilql")
        save_hf(ppo, None, tmp_path / "ppo")
        again = build_policy(tiny_model(), value_head=True, q_heads=2)
        new = copy.deepcopy(again.q_heads.state_dict())
        load_heads(again, tmp_path / "ppo")
    for policy in (ppo, again):
        for name, weight in ilql.value_head.state_dict().items():
            assert torch.equal(policy.value_head.state_dict()[name], weight), name
    assert all(torch.equal(again.q_heads.state_dict()[name], weight) for name, weight in new.items())
    first, second = (message.partition("this method ")[2] for message in caplog.messages)
    assert (first, second) == ("takes value, leaves out q", "takes value, makes new q")


def test_heads_of_another_size_are_refused(tmp_path):
    save_hf(build_policy(tiny_model(), q_heads=2), None, tmp_path)
    for needs in ({"q_heads": 1}, {"q_heads": 1, "value_head": True}):
        with pytest.raises(ValueError, match="have other sizes than those this method needs"):
            load_heads(build_policy(tiny_model(), **needs), tmp_path)


def test_weights_load_in_float32_unless_a_dtype_is_named(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    config = tiny_config(dtype="bfloat16")
    for source in (str(tmp_path), config):
        assert load_model(source, {}).dtype == torch.float32
        assert load_model(source, {"dtype": "bfloat16"}).dtype == torch.bfloat16
        assert load_model(source, {"torch_dtype": "bfloat16"}).dtype == torch.bfloat16


def test_the_config_a_model_is_made_from_is_not_changed():
    config = tiny_config(dtype="bfloat16")
    load_model(config, {"attn_implementation": "eager"})
    assert config.dtype == torch.bfloat16


def test_gpt2s_gelu_is_one_operation_that_rounds_differently():
    plain = tiny_model("gpt2")
    fused = load_model(plain.config, {})
    fused.load_state_dict(plain.state_dict())
    assert not any(isinstance(module, NewGELUActivation) for module in fused.modules())
    tokens, *_ = ragged_batch()
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(tokens).logits, plain(tokens).logits, rtol=0, atol=1e-6)


def test_extra_settings_reach_the_config_of_the_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert load_model(tmp_path, {"attn_implementation": "eager"}).config._attn_implementation == "eager"


def test_a_path_that_leads_nowhere_is_named(tmp_path):
    with pytest.raises(OSError, match="No model at .*nowhere.*neither a folder"):
        load_model(tmp_path / "nowhere", {})


def llama(pad: int | None) -> LlamaConfig:
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return LlamaConfig(**sizes, pad_token_id=pad, eos_token_id=2)


def test_where_pad_is_eos_its_embedding_trains_as_that_of_any_other_token(tmp_path):
    gradients = []
    AutoModelForCausalLM.from_config(llama(pad=None)).save_pretrained(tmp_path)
    for pad in (None, 2):
        llama(pad).save_pretrained(tmp_path)
        policy = build_policy(load_model(tmp_path, {}))
        tokens = torch.tensor([[5, 2, 6, 2, 2]])  # the last one pads
        policy(tokens, tokens > 9, torch.tensor([[0, 0, 1, 1, 0]]).bool()).logprobs.sum().backward()
        gradients.append(policy.model.get_input_embeddings().weight.grad)
    assert torch.equal(*gradients)
    # a token has a gradient where it stands before a scored one
    assert gradients[0].any(dim=1).tolist() == [False, False, True, False, False, True, True, False]


def test_a_new_model_has_an_embedding_of_pad_like_those_of_other_tokens():
    # transformers makes zeros of it, and a norm multiplies the gradients of zeros by a thousand
    found, expected = (load_model(llama(pad), {}).get_input_embeddings().weight for pad in (2, None))
    assert 0.5 < found[2].std() / expected.std() < 2
