"""Adapters: LoRA, virtual tokens and modules to save, on decoders and encoder-decoder models."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.builders import responses as sampled
from tests.builders import tiny_gpt2, tiny_gpt2_config
from tests.runs import metrics, run, weights
from tests.unit.test_seq2seq import CONFIGS, run_seq2seq, tiny_policy
from tests.unit.test_seq2seq import inputs as seq2seq_inputs
from tests.unit.test_seq2seq import tiny_batch as seq2seq_batch
from tests.unit.tiny_models import ragged_batch, tiny_model
from trlx.config import ModelConfig
from trlx.models.adapters import AdapterOff, build_adapted_policy
from trlx.models.architecture import Causal, EncoderDecoder
from trlx.models.policy import build_policy, load_model
from trlx.models.quantization import quantized
from trlx.sampling.settings import SamplingConfig
from trlx.strict import ConfigError

peft = pytest.importorskip("peft")
# advice about a head that an adapter trains apart from the embeddings, which is what these tests are about
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
P_TUNING = {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 16}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
ADAPTERS = {
    "lora": LORA,
    "lora_and_head": {**LORA, "modules_to_save": ["lm_head"]},
    "ia3": {"peft_type": "IA3"},
    "prompt": PROMPT,
    "p_tuning": P_TUNING,
    "prefix": PREFIX,
}
every_adapter = pytest.mark.parametrize("name", ADAPTERS)
every_model = pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "t5", "t5_untied", "bart"])
RUNS = ["gpt2-lora_and_head", "gpt2-prompt", "gpt2-p_tuning", "gpt2-prefix", "t5-lora", "t5-prefix", "bart-prompt"]
RUNS = [tuple(run.split("-")) for run in RUNS]


def adapted(family, adapter, **needs):
    """A policy with large random adapter weights, so that every part of it matters."""
    if family in CONFIGS:
        policy = build_adapted_policy(tiny_policy(family).model, adapter, architecture=EncoderDecoder, **needs)
    else:
        policy = build_adapted_policy(decoder(family), adapter, **needs)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if weight.requires_grad and not name.startswith("heads."):
                weight.add_(torch.randn_like(weight) * 0.5)
    return policy.eval()


def decoder(family):
    # see PrefixTuned for what a short window would do
    return tiny_model(family, **({"sliding_window": 32} if family == "gemma2" else {}))


def batch_of(family):
    return seq2seq_inputs(seq2seq_batch()) if family in CONFIGS else ragged_batch()


def peft_logits(policy, tokens, attention_mask, response_mask, encoder_tokens=None, encoder_mask=None):
    """What PEFT's own forward says of whole, unpadded rows."""
    adapter = policy.adapter
    if encoder_tokens is None:
        logits = adapter(input_ids=tokens, attention_mask=attention_mask.long()).logits
    else:
        rows = {"input_ids": encoder_tokens, "attention_mask": encoder_mask.long(), "decoder_input_ids": tokens}
        logits = adapter(**rows).logits
    return logits[:, -tokens.shape[1] :]


@every_adapter
@every_model
def test_logprobs_are_those_of_pefts_own_forward(family, name):
    policy, batch = adapted(family, ADAPTERS[name], temperature=0.7), batch_of(family)
    with torch.no_grad():
        found, logits = policy(*batch).logprobs, peft_logits(policy, *batch)
    expected = (logits[:, :-1] / 0.7).log_softmax(-1).gather(2, batch[0][:, 1:, None]).squeeze(2)
    expected = torch.nn.functional.pad(expected, (1, 0)) * batch[2]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@every_adapter
@every_model
def test_the_reference_is_the_model_without_its_adapter(family, name):
    policy, batch = adapted(family, ADAPTERS[name]), batch_of(family)
    bare = tiny_policy(family) if family in CONFIGS else build_policy(decoder(family))
    with torch.no_grad():
        before = policy(*batch).logprobs
        reference = AdapterOff(policy)
        with reference.active():
            assert torch.equal(policy(*batch).logprobs, bare(*batch).logprobs)
        assert torch.equal(policy(*batch).logprobs, before)
    assert not torch.equal(before, bare(*batch).logprobs)
    assert any(weight.requires_grad for weight in policy.parameters())


@every_adapter
@every_model
def test_sampling_draws_from_the_distribution_that_is_scored(family, name):
    policy = adapted(family, ADAPTERS[name])
    prompts = [[5, 6, 7, 8, 9], [9], [10, 11]]
    sampling = SamplingConfig(max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
    for prompt, response in zip(prompts, sampled(policy, prompts, sampling), strict=True):
        assert 1 <= len(response) <= 5
        prompt_ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt)).bool()
        start = [policy.architecture.start_id] if family in CONFIGS else prompt
        with torch.no_grad():
            states = policy.architecture.states(torch.tensor([[*start, *response]]), prompt_ids, mask)
            assert policy.logits(states)[0, len(start) - 1 : -1].argmax(-1).tolist() == response


def test_sampling_draws_from_the_reference_too_while_it_is_active():
    policy = adapted("gpt2", PREFIX)
    sampling = SamplingConfig(max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
    with AdapterOff(policy).active():
        found = sampled(policy, [[5, 6], [7]], sampling)
    assert found == sampled(build_policy(tiny_model("gpt2")), [[5, 6], [7]], sampling)


@pytest.mark.parametrize(
    ("adapter", "same"),
    [(LORA, True), (ADAPTERS["lora_and_head"], True), (ADAPTERS["ia3"], True), (PROMPT, False), (PREFIX, False)],
)
def test_a_new_lora_starts_at_the_reference_and_virtual_tokens_do_not(adapter, same):
    assert AdapterOff(build_adapted_policy(tiny_model("gpt2"), adapter)).is_first_policy() is same


def test_weights_of_the_model_that_an_adapter_trains_go_back_for_the_reference():
    policy = build_adapted_policy(tiny_model("gpt2"), {**LORA, "bias": "all"})
    reference, batch = AdapterOff(policy), ragged_batch()
    first = policy(*batch).logprobs
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(1) if weight.requires_grad else None
    with reference.active():
        assert torch.equal(policy(*batch).logprobs, first)


def test_an_adapter_that_changes_the_model_itself_leaves_no_reference():
    policy = build_adapted_policy(tiny_model("llama"), {**LORA, "init_lora_weights": "pissa"})
    with pytest.raises(ValueError, match="no reference policy left"):
        AdapterOff(policy)


def test_without_dropout_a_training_forward_equals_an_evaluation_forward():
    policy = adapted("gpt2", {**LORA, "lora_dropout": 0.5}, dropout=False)
    assert torch.equal(policy.train()(*ragged_batch()).logprobs, policy.eval()(*ragged_batch()).logprobs)
    policy = adapted("gpt2", {**LORA, "lora_dropout": 0.5}, dropout=True)
    assert not torch.equal(policy.train()(*ragged_batch()).logprobs, policy.eval()(*ragged_batch()).logprobs)


def test_value_blocks_of_their_own_go_with_lora_and_not_with_virtual_tokens():
    policy = adapted("gpt2", LORA, value_head=True, value_layers=2)
    assert policy(*ragged_batch()).values.shape == ragged_batch()[0].shape
    with pytest.raises(ValueError, match="set method.num_value_layers_unfrozen to 0"):
        adapted("gpt2", PREFIX, value_head=True, value_layers=2)


# whole runs


def saved_base(folder, family="gpt2"):
    """The folder of a tiny model, so that an adapter can say where its model is."""
    path = folder / "base"
    if not path.exists():
        torch.manual_seed(5)
        model = load_model(CONFIGS[family](), {}, EncoderDecoder) if family in CONFIGS else tiny_gpt2()
        model.save_pretrained(path)
    return str(path)


def run_adapted(algorithm, folder, family, adapter, model=None, **changes):
    model = {"model_path": saved_base(folder.parent, family), "peft_config": adapter, **(model or {})}
    return (
        run_seq2seq(algorithm, folder, model, **changes)
        if family in CONFIGS
        else run(algorithm, folder, model=model, **changes)
    )


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_ppo_trains_only_the_adapter_and_the_heads(tmp_path, family, name):
    trainer = run_adapted("PPO", tmp_path / "run", family, ADAPTERS[name], train={"total_steps": 5})
    lines = [line for line in metrics(tmp_path / "run") if "ratio" in line]
    starts_there = name in ("lora", "lora_and_head", "ia3")
    assert (lines[0]["policy/kl"] == 0.0) == starts_there == trainer.backend.starts_at_reference
    assert lines[0]["policy/ratio_deviation/max"] < 1e-5
    assert max(line["grad_norm"] for line in lines) > 0
    trained, policy = weights(tmp_path / "run"), trainer.backend.policy
    assert {key.split(".")[0] for key in trained} <= {"model", "adapter", "heads"}
    mine = {key for key, weight in policy.named_parameters() if weight.requires_grad}
    assert mine == {key for key in trained if not key.startswith("heads.")} | {
        k for k in mine if k.startswith("heads.")
    }
    base = load_model(saved_base(tmp_path, family), {}, type(policy.architecture.bare()))
    frozen = {
        key.replace(".base_layer", "").replace(".original_module", ""): w
        for key, w in policy.model.state_dict().items()
    }
    assert [key for key, weight in base.state_dict().items() if not torch.equal(weight, frozen[key])] == []


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("PPO", "lora"),
        ("PPO", "prefix"),
        ("SFT", "lora_and_head"),
        ("ILQL", "prompt"),
        ("DPO", "lora"),
        ("KTO", "lora"),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, algorithm, name):
    every = {"checkpoint_interval": 1, "total_steps": 6, "eval_interval": 3}
    for folder, changes in [
        ("whole", {}),
        ("parts", {"total_steps": 3}),
        ("parts", {"resume_from_checkpoint": "auto"}),
    ]:
        run_adapted(algorithm, tmp_path / folder, "gpt2", ADAPTERS[name], train={**every, **changes})
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_resume_with_a_peft_config_object_finds_nothing_changed(tmp_path, caplog):
    adapter = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"])
    run_adapted("SFT", tmp_path / "run", "gpt2", adapter, train={"total_steps": 1})
    resume = {"total_steps": 2, "resume_from_checkpoint": "auto"}
    run_adapted("SFT", tmp_path / "run", "gpt2", adapter, train=resume)
    assert "then," not in caplog.text
    state = json.loads((tmp_path / "run" / "checkpoint_2" / "trainer_state.json").read_text())
    assert state["run"]["config"]["model"]["peft_config"]["target_modules"] == ["c_attn", "c_fc", "c_proj"]


@pytest.mark.parametrize("name", ["lora", "p_tuning", "prefix"])
def test_sft_learns_its_samples(tmp_path, name):
    means = []
    for steps in (0, 20):
        changes = {"train": {"total_steps": steps, "eval_interval": 20}, "optimizer": {"kwargs": {"lr": 0.05}}}
        trainer = run_adapted("SFT", tmp_path / str(steps), "gpt2", ADAPTERS[name], **changes)
        batch = trainer.store.rows(slice(None))
        means.append(float(trainer.backend.evaluate(batch).logprobs[batch.response_mask].mean()))
    assert means[1] > means[0] + 0.01


def trainable(backend):
    named = backend.policy.named_parameters()
    return {name for name, weight in named if weight.requires_grad and not name.startswith("heads.")}


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_an_exported_folder_holds_the_adapter_and_trains_on(tmp_path, family, name):
    changes = {"train": {"total_steps": 2}, "optimizer": {"kwargs": {"lr": 0.05}}}
    trainer = run_adapted("PPO", tmp_path / "run", family, ADAPTERS[name], **changes)
    trainer.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "trlx_heads.safetensors"} <= names
    assert "model.safetensors" not in names and (tmp_path / "run/checkpoint_2/hf_model/adapter_config.json").is_file()
    model = {"model_path": str(tmp_path / "saved"), "peft_config": None}
    again = run_adapted("PPO", tmp_path / "again", family, None, model, train={"total_steps": 0})
    first, second = trainer.backend, again.backend
    batch = trainer.collect()
    assert torch.equal(first.evaluate(batch).logprobs, second.evaluate(batch).logprobs)
    assert torch.equal(first.evaluate(batch).values, second.evaluate(batch).values)
    assert torch.equal(first.evaluate(batch, reference=True).logprobs, second.evaluate(batch, reference=True).logprobs)
    assert not second.starts_at_reference
    # of virtual tokens only what they have become is saved, not what made them
    virtual = {"adapter.prompt_encoder.default.embedding.weight"}
    assert trainable(second) == (trainable(first) if name.startswith("lora") else virtual)
    again.backend.train_step(batch, again.loss)


@pytest.mark.parametrize(("family", "name"), [("gpt2", "lora"), ("gpt2", "lora_and_head"), ("t5", "lora")])
def test_a_merged_export_loads_in_plain_transformers(tmp_path, family, name, monkeypatch):
    changes = {"train": {"total_steps": 3}, "optimizer": {"kwargs": {"lr": 0.02}}}
    trainer = run_adapted("PPO", tmp_path / "run", family, ADAPTERS[name], **changes)
    policy, before = trainer.backend.policy.eval(), weights(tmp_path / "run")
    trainer.save_pretrained(tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    loader = AutoModelForSeq2SeqLM if family in CONFIGS else AutoModelForCausalLM
    loaded, ids = loader.from_pretrained(tmp_path / "merged").eval(), torch.tensor([[4, 5, 6, 7]])
    rows = {"decoder_input_ids": ids} if family in CONFIGS else {}
    with torch.no_grad():
        expected = policy.adapter(input_ids=ids, **rows).logits
        torch.testing.assert_close(loaded(input_ids=ids, **rows).logits, expected, rtol=1e-4, atol=1e-5)
    after = {key: weight for key, weight in policy.named_parameters() if key in before}
    assert after.keys() == before.keys() and all(torch.equal(before[key], weight) for key, weight in after.items())


def test_virtual_tokens_cannot_be_merged(tmp_path):
    trainer = run_adapted("SFT", tmp_path / "run", "gpt2", PROMPT, train={"total_steps": 1})
    with pytest.raises(ValueError, match="PROMPT_TUNING cannot be merged"):
        trainer.save_pretrained(tmp_path / "merged", merge=True)


def test_gradient_checkpointing_changes_nothing_with_lora_and_is_refused_with_a_prefix(tmp_path):
    for recompute in (False, True):
        changes = {"total_steps": 3, "gradient_checkpointing": recompute}
        run_adapted("PPO", tmp_path / str(recompute), "gpt2", LORA, train=changes)
    plain, recomputed = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert max(float((plain[name] - recomputed[name]).abs().max()) for name in plain) < 1e-6
    with pytest.raises(ValueError, match="would drop the prefix"):
        run_adapted("SFT", tmp_path / "no", "gpt2", PREFIX, train={"gradient_checkpointing": True})


def test_an_adapter_is_never_taken_for_a_whole_model(tmp_path):
    trainer = run_adapted("SFT", tmp_path / "run", "gpt2", LORA, train={"total_steps": 1})
    trainer.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="is an adapter: download it"):
        load_model(str(tmp_path / "saved"), {})
    config = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    (tmp_path / "saved/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name the model that the adapter belongs to"):
        run("SFT", tmp_path / "again", model={"model_path": str(tmp_path / "saved")})


def test_num_layers_unfrozen_says_nothing_of_a_model_with_an_adapter(tmp_path, caplog):
    run_adapted("SFT", tmp_path / "run", "gpt2", LORA, {"num_layers_unfrozen": 1}, train={"total_steps": 1})
    told = [record.levelname for record in caplog.records if "whatever model.num_layers_unfrozen" in record.message]
    assert told == ["INFO"]
    assert all("lora_" in name for name in weights(tmp_path / "run"))


# settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"r": 8}, "peft_type"),
        ({"peft_type": "LORA", "rank": 8}, "PEFT does not understand model.peft_config"),
        ({"peft_type": "LARO"}, "PEFT does not understand model.peft_config"),
        ({**LORA, "task_type": "SEQ_2_SEQ_LM"}, "task_type must be CAUSAL_LM"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2}, "MULTITASK_PROMPT_TUNING is not supported"),
    ],
)
def test_wrong_settings_are_told_in_a_sentence(given, words):
    with pytest.raises(ValueError, match=words):
        build_adapted_policy(tiny_model("gpt2"), given)


def test_a_peft_config_is_a_dict_or_an_object():
    with pytest.raises(ConfigError, match="model.peft_config must be a dict with peft_type"):
        ModelConfig("gpt2", peft_config="LORA")


def test_without_peft_the_error_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'model.peft_config needs peft.*pip install "trlx\[peft\]"'):
        build_adapted_policy(tiny_model("gpt2"), LORA)


def test_quantized_loading_needs_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for switch in ("load_in_8bit", "load_in_4bit"):
        with pytest.raises(ImportError, match=r'8 or 4 bits needs bitsandbytes.*pip install "trlx\[bnb\]"'):
            load_model(tiny_gpt2_config(), {switch: True})
    assert quantized({"load_in_8bit": False, "dtype": "bfloat16"}) == {"dtype": "bfloat16"}


def test_quantized_weights_are_asked_for_in_transformers_own_way(monkeypatch):
    monkeypatch.setattr("trlx.models.quantization.require", lambda *args, **kwargs: None)
    options = quantized({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "dtype": "bfloat16"})
    settings = options["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4"
    assert options["device_map"] == {"": "cpu"} and options["dtype"] == "bfloat16" and len(options) == 3


def test_quantized_weights_do_not_train_themselves():
    model = tiny_model("gpt2")
    model.is_quantized = True
    with pytest.raises(ValueError, match="Quantized weights cannot train"):
        build_policy(model)
    assert isinstance(build_policy(model, num_layers_unfrozen=0, value_head=True).architecture, Causal)
