"""Encoder-decoder models: T5 (tied and untied) and BART, from rows to whole runs."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tokenizers import processors
from transformers import AutoModelForSeq2SeqLM

import trlx
from tests.builders import VOCABULARY, char_tokenizer
from tests.builders import responses as sampled
from tests.runs import DATA, PROMPTS, length, metrics, share_of_a, tiny_config, weights
from trlx.batch import Rollout, Sample
from trlx.data.collate import EncoderDecoderRows
from trlx.data.dialogue import dialogues
from trlx.models.architecture import EncoderDecoder
from trlx.models.policy import build_policy, load_model, save_hf
from trlx.sampling.settings import SamplingConfig

_SPECIAL = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_T5 = dict(
    _SPECIAL,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=3,
    num_heads=4,
    decoder_start_token_id=0,
    dropout_rate=0.1,
)
_BART = dict(
    _SPECIAL,
    d_model=32,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    forced_eos_token_id=None,
    decoder_start_token_id=2,
    dropout=0.1,
)
CONFIGS = {
    "t5": lambda: hf.T5Config(**_T5),
    "t5_untied": lambda: hf.T5Config(
        **_T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu", initializer_factor=0.1
    ),
    "bart": lambda: hf.BartConfig(**_BART),
}
every_family = pytest.mark.parametrize("name", CONFIGS)


def tokenizer_that_ends_texts(template="$A </s>"):
    """The character tokenizer with </s> after every text, as T5's."""
    tokenizer, special = char_tokenizer(), [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def run_of(name, algorithm, folder, model=None, **changes):
    model = {"model_path": CONFIGS[name](), **(model or {})}
    return run_seq2seq(algorithm, folder, model, **changes)


def run_seq2seq(algorithm, folder, model, **changes):
    """`run` for an encoder-decoder model."""
    model, tokenizer = {"model_arch_type": "seq2seq", **model}, {"tokenizer_path": tokenizer_that_ends_texts()}
    config = tiny_config(folder, algorithm, model=model, tokenizer=tokenizer, **changes)
    data = DATA[algorithm] | ({"reward_fn": spread} if algorithm in ("PPO", "GRPO") else {})
    return trlx.train(config=config, metric_fn=length, **data)


def spread(samples, prompts, outputs, **kwargs):
    """A reward that hardly two samples share: these models repeat a few letters at first, and where all rewards are the
    same, whitened advantages are rounding alone."""
    return [sum(map(ord, sample)) % 17 / 17 for sample in samples]


def tiny_policy(name, **needs):
    """A policy whose weights are large enough that every part of the model matters."""
    torch.manual_seed(0)
    model = load_model(CONFIGS[name](), {}, EncoderDecoder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.dim() == 2 else None
        if name == "t5_untied":  # a checkpoint that holds both weights, as T5 v1.1's, is loaded untied
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        if name == "bart":
            model.final_logits_bias.normal_()
    model.generation_config.decoder_start_token_id = None  # config.json alone must do
    return build_policy(model.eval(), architecture=EncoderDecoder, **needs)


def tiny_batch():
    rollouts = [Rollout([5, 6, 7, 2], [8, 9, 2], 1.0), Rollout([10, 2], [11, 12, 13, 14], 2.0)]
    return EncoderDecoderRows(0).collate(rollouts, pad_id=0)


def inputs(batch):
    return batch.tokens, batch.attention_mask, batch.response_mask, batch.encoder_tokens, batch.encoder_mask


def test_the_prompt_goes_to_the_encoder_and_every_response_token_is_trained():
    batch = tiny_batch()
    assert batch.encoder_tokens.tolist() == [[5, 6, 7, 2], [10, 2, 0, 0]]
    assert batch.encoder_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.tokens.tolist() == [[0, 8, 9, 2, 0], [0, 11, 12, 13, 14]]
    assert batch.response_mask.tolist() == [[False, True, True, True, False], [False, True, True, True, True]]
    assert batch.attention_mask.tolist() == [[True, True, True, True, False], [True] * 5]
    assert batch.scores.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 2]]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="Rollout 0 has an empty prompt"):
        EncoderDecoderRows(0).collate([Rollout([], [4])], pad_id=0)


@every_family
def test_logprobs_are_those_of_the_labels_in_plain_transformers(name):
    policy, batch = tiny_policy(name, temperature=0.7), tiny_batch()
    batch.tokens[:, 0] = policy.architecture.start_id
    labels = torch.where(batch.response_mask, batch.tokens, -100)[:, 1:].contiguous()
    with torch.no_grad():
        found = policy(*inputs(batch)).logprobs
        logits = policy.model(batch.encoder_tokens, attention_mask=batch.encoder_mask.long(), labels=labels).logits
    expected = (logits / 0.7).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    expected = torch.nn.functional.pad(expected, (1, 0)) * batch.response_mask
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[batch.response_mask] < 0).all()


@every_family
def test_garbage_in_the_padding_of_either_row_changes_nothing(name):
    policy, batch = tiny_policy(name, value_head=True), tiny_batch()
    garbage = batch.replace(
        tokens=torch.where(batch.attention_mask, batch.tokens, 17),
        encoder_tokens=torch.where(batch.encoder_mask, batch.encoder_tokens, 17),
    )
    with torch.no_grad():
        clean, dirty = policy(*inputs(batch)), policy(*inputs(garbage))
    torch.testing.assert_close(clean.logprobs, dirty.logprobs, rtol=0, atol=1e-6)


@every_family
def test_each_row_is_scored_as_if_it_were_alone(name):
    policy, batch = tiny_policy(name), tiny_batch()
    with torch.no_grad():
        together, alone = policy(*inputs(batch)).logprobs[0], policy(*inputs(batch.rows([0]))).logprobs[0]
    torch.testing.assert_close(together[: len(alone)], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "scale"), [("t5", 32**-0.5), ("t5_untied", 1.0), ("bart", 1.0)])
def test_only_a_t5_with_tied_embeddings_scales_what_its_output_head_gets(name, scale):
    assert tiny_policy(name).logits.scale == scale


@every_family
def test_freezing_leaves_the_top_decoder_blocks_their_norm_and_an_untied_head(name):
    policy = tiny_policy(name, num_layers_unfrozen=1)
    trained = {name for name, weight in policy.model.named_parameters() if weight.requires_grad}
    top = {"t5": "decoder.block.2.", "t5_untied": "decoder.block.2.", "bart": "model.decoder.layers.2."}[name]
    others = {"t5": {"decoder.final_layer_norm.weight"}, "bart": set()}
    others["t5_untied"] = {"decoder.final_layer_norm.weight", "lm_head.weight"}
    assert {name for name in trained if not name.startswith(top)} == others[name]
    assert any(name.startswith(top) for name in trained)


def test_more_decoder_blocks_than_there_are_cannot_be_trained():
    with pytest.raises(ValueError, match="has 3 blocks"):
        tiny_policy("bart", num_layers_unfrozen=4)


@every_family
def test_a_value_branch_starts_as_the_trunk(name):
    policy, batch = tiny_policy(name, value_head=True, value_layers=2), tiny_batch()
    branch = policy.value_head
    with torch.no_grad(), branch.watching():
        hidden = policy.architecture.states(batch.tokens, batch.encoder_tokens, batch.encoder_mask)
        torch.testing.assert_close(branch.states(hidden), hidden, rtol=0, atol=1e-5)


@every_family
def test_sampling_draws_from_the_distribution_that_is_scored(name):
    policy = tiny_policy(name)
    prompts = [[5, 6, 7, 8, 2], [9, 2], [10, 11, 2]]
    sampling = SamplingConfig(max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
    responses = sampled(policy, prompts, sampling)
    start = policy.architecture.start_id
    for prompt, response in zip(prompts, responses, strict=True):
        row = torch.tensor([[start, *response]])
        with torch.no_grad():
            states = policy.architecture.states(row, torch.tensor([prompt]), torch.ones(1, len(prompt)).bool())
            assert policy.logits(states)[0, :-1].argmax(-1).tolist() == response


def test_tokens_of_the_encoders_prompt_were_not_said_by_the_decoder():
    policy, every = tiny_policy("t5"), list(range(VOCABULARY))
    plain = SamplingConfig(max_new_tokens=1, do_sample=False)
    once = SamplingConfig(max_new_tokens=1, do_sample=False, extra={"no_repeat_ngram_size": 1})
    (likeliest,) = sampled(policy, [every], plain)
    assert likeliest != [policy.architecture.start_id]
    assert sampled(policy, [every], once) == [likeliest]


@pytest.mark.parametrize(("name", "layers"), [("t5", -1), ("t5", 0), ("t5_untied", 1), ("bart", -1), ("bart", 1)])
def test_ppo_starts_at_the_reference_trains_and_saves(tmp_path, name, layers):
    trainer = run_of(name, "PPO", tmp_path, {"num_layers_unfrozen": layers}, train={"total_steps": 3})
    lines = [line for line in metrics(tmp_path) if "ratio" in line]
    assert lines[0]["policy/kl"] == 0.0 and lines[0]["policy/ratio_deviation/max"] < 1e-5
    assert max(line["grad_norm"] for line in lines) > 0 and lines[-1]["skipped_steps"] == 0
    same_logits(trainer, tmp_path / "checkpoint_3" / "hf_model")


@every_family
def test_the_reference_is_the_first_policy_after_any_training(tmp_path, name):
    trainer = run_of(name, "PPO", tmp_path, train={"total_steps": 0})
    batch = trainer.collect()
    first = trainer.backend.evaluate(batch).logprobs
    trainer.backend.train_step(batch.rows([0, 1]), trainer.loss)
    assert torch.equal(trainer.backend.evaluate(batch, reference=True).logprobs, first)
    assert not torch.equal(trainer.backend.evaluate(batch).logprobs, first)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_sft_learns_its_samples(tmp_path, name):
    trainer = run_of(name, "SFT", tmp_path, train={"total_steps": 25, "eval_interval": 25})
    losses = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    same_logits(trainer, tmp_path / "checkpoint_25" / "hf_model")


@every_family
def test_an_exported_model_has_identical_logits_in_plain_transformers(tmp_path, name):
    policy, ids = tiny_policy(name), torch.tensor([[4, 5, 6, 7]])
    save_hf(policy, None, tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = policy.model(ids, decoder_input_ids=ids).logits
        assert torch.equal(loaded(ids, decoder_input_ids=ids).logits, expected)
    assert load_model(str(tmp_path), {}, EncoderDecoder).config.decoder_start_token_id == policy.architecture.start_id


def test_gradient_checkpointing_changes_nothing(tmp_path):
    calm = {"kwargs": {"eps": 1e-4}}  # else Adam makes steps of gradients that are 0 but for rounding
    for recompute in (False, True):
        train = {"total_steps": 3, "gradient_checkpointing": recompute}
        run_of("t5", "PPO", tmp_path / str(recompute), train=train, optimizer=calm)
    plain, recomputed = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert max(float((plain[name] - recomputed[name]).abs().max()) for name in plain) < 1e-5


def test_ilql_samples_with_its_q_heads(tmp_path):
    trainer = run_of("t5", "ILQL", tmp_path, train={"total_steps": 2})
    evaluation = metrics(tmp_path)[0]
    assert {"metrics/length@beta=0", "metrics/length@beta=2"} <= evaluation.keys()
    assert all(rollout.prompt[-1] == 2 for rollout in trainer.store.rollouts)


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [("bart", "PPO"), *(("t5", algorithm) for algorithm in ("PPO", "SFT", "ILQL", "DPO", "KTO"))],
)
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, name, algorithm):
    every = {"checkpoint_interval": 1, "total_steps": 4, "eval_interval": 2}
    run_of(name, algorithm, tmp_path / "whole", train=every)
    run_of(name, algorithm, tmp_path / "parts", train={**every, "total_steps": 2})
    run_of(name, algorithm, tmp_path / "parts", train={**every, "resume_from_checkpoint": "auto"})
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_microbatches_change_nothing(tmp_path):
    calm = {"kwargs": {"eps": 1e-4}}
    for size in (1, 4):
        run_of("t5", "PPO", tmp_path / str(size), train={"minibatch_size": size, "total_steps": 3}, optimizer=calm)
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    assert max(float((one[name] - four[name]).abs().max()) for name in one) < 1e-5


def test_a_sample_is_prompt_separator_output_and_prompts_keep_their_special_tokens(tmp_path):
    def reward(samples, prompts, outputs, **kwargs):
        assert set(prompts) <= set(PROMPTS)
        assert samples == [f"{prompt}<sep>{output}" for prompt, output in zip(prompts, outputs, strict=True)]
        return share_of_a(samples, prompts, outputs)

    def metric(samples, prompts, outputs, **kwargs):
        reward(samples, prompts, outputs)
        return {}

    model = {"model_path": CONFIGS["t5"](), "model_arch_type": "seq2seq"}
    tokenizer = {"tokenizer_path": tokenizer_that_ends_texts()}
    config = tiny_config(tmp_path, "PPO", model=model, tokenizer=tokenizer, train={"total_steps": 1})
    trainer = trlx.train(config=config, reward_fn=reward, metric_fn=metric, prompts=PROMPTS)
    ends = trainer.store.encoder_mask.sum(1) - 1
    assert trainer.store.encoder_tokens.gather(1, ends[:, None]).unique().tolist() == [2]
    sequences = trainer.generate([[5, 6, 2], [7, 2]], max_new_tokens=3)
    assert sequences[:, 0].tolist() == [0, 0] and sequences.shape[1] <= 4
    asked = []
    trainer.sampler.generate = lambda prompts, sampling: asked.extend(prompts) or [Sample([2])]
    assert trainer.generate("ab") == "" and asked == [[4, 5, 2]]


def test_dialogues_of_encoder_decoder_models_have_the_tokenizers_special_tokens():
    samples = ["ab", ["ab", "ca"], ["a", "b", "c", "d"]]
    plain, pair, long = dialogues(samples, tokenizer_that_ends_texts(), 16, special_tokens=True)
    assert (plain.prompt, plain.response) == ([2], [4, 5, 2])
    assert (pair.prompt, pair.response) == ([4, 5, 2], [6, 4, 2])
    assert (long.prompt, long.response) == ([4, 2], [5, 2, 6, 2, 7, 2])
    assert long.trained == [True, True, False, False, True, True]
    (plain,) = dialogues(["ab"], tokenizer_that_ends_texts("<s> $A </s>"), 16, special_tokens=True)
    assert (plain.prompt, plain.response) == ([1, 2], [1, 4, 5, 2])


def test_a_decoder_without_a_start_token_is_refused():
    with pytest.raises(ValueError, match="has no decoder_start_token_id"):
        EncoderDecoder(load_model(hf.T5Config(**{**_T5, "decoder_start_token_id": None}), {}, EncoderDecoder))


def same_logits(trainer, folder):
    loaded, ids = AutoModelForSeq2SeqLM.from_pretrained(folder), torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        found = loaded(ids, decoder_input_ids=ids).logits
        assert torch.equal(found, trainer.backend.policy.model.eval()(ids, decoder_input_ids=ids).logits)
