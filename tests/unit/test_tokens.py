"""What is trained is what was sampled, token by token, whatever special tokens a tokenizer has."""

import copy

import pytest

import trlx
from tests.builders import char_tokenizer, tiny_gpt2_config
from tests.runs import PROMPTS, share_of_a, tiny_config
from trlx.batch import Sample
from trlx.data.prompts import PromptPipeline
from trlx.trainer.accelerate import AcceleratePPOTrainer

BOS, EOS = 1, 2
KINDS = {
    "plain": {},
    "prepends bos": {"adds_bos": True},
    "prepends bos, appends eos": {"adds_bos": True, "adds_eos": True},
    "no pad": {"pad": False},
    "pad is eos": {"pad_is_eos": True},
    "no bos": {"bos": False},
}


def collected(tmp_path, kind, prompts=PROMPTS, **changes):
    """(prompts and responses as the backend had them, what reward_fn got, the collection, the trainer)."""
    texts = []

    def reward(samples, prompts, outputs, output_ids, ended, **kwargs):
        texts.extend(zip(samples, prompts, outputs, output_ids, ended, strict=True))
        return share_of_a(samples, prompts, outputs)

    method = {"num_rollouts": 32, "chunk_size": 8, **changes}
    tokenizer = {"tokenizer_path": char_tokenizer(**KINDS[kind])}
    # where pad is eos, the model's own padding id must not decide anything either
    model = {"model_path": tiny_gpt2_config(pad_token_id=None)}
    config = tiny_config(tmp_path, "PPO", method=method, tokenizer=tokenizer, model=model)
    trainer = AcceleratePPOTrainer(config=config, reward_fn=reward)
    trainer.add_prompt_pipeline(PromptPipeline(prompts, 8, trainer.tokenizer))
    sampled, generate = [], trainer.sampler.generate

    def spy(prompts, sampling):
        samples = generate(prompts, sampling)
        sampled.extend(copy.deepcopy([(p, s.ids) for p, s in zip(prompts, samples, strict=True)]))
        return samples

    trainer.sampler.generate = spy
    return sampled, texts, trainer.collect(), trainer


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_in_the_collection_are_the_ids_that_were_sampled(tmp_path, kind):
    sampled, _, batch, trainer = collected(tmp_path, kind)
    ended = 0
    for row, (prompt, response) in enumerate(sampled):
        length = len(prompt) + len(response)
        assert batch.tokens[row, :length].tolist() == prompt + response
        assert batch.attention_mask[row].tolist() == [t < length for t in range(batch.tokens.shape[1])]
        # every sampled token is trained, the eos of the model included, and nothing else is
        assert batch.response_mask[row].nonzero().flatten().tolist() == list(range(len(prompt), length))
        assert EOS not in response[:-1] and batch.old_logprobs[row, length - 1] < 0
        ended += response[-1] == EOS
    assert len(sampled) == len(batch) == 32 and 0 < ended < 32
    assert trainer.pending["rollouts/ended"] == ended / 32


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_sampled_from_as_they_were_written_behind_what_the_tokenizer_puts_in_front(tmp_path, kind):
    sampled, texts, _, trainer = collected(tmp_path, kind)
    start = [BOS] if "prepends" in kind else []
    assert {tuple(prompt) for prompt, _ in sampled} == {
        (*start, *trainer.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in PROMPTS
    }
    for (sample, prompt, output, output_ids, ended), (ids, response) in zip(texts, sampled, strict=True):
        assert sample == prompt + output and prompt in PROMPTS and len(prompt) == len(ids) - len(start)
        assert output_ids == response and ended == (response[-1] == EOS) and "</s>" not in sample


@pytest.mark.parametrize("kind", ["plain", "prepends bos"])
def test_a_bos_that_a_prompt_brings_along_stays_one(tmp_path, kind):
    sampled, _, batch, _ = collected(tmp_path, kind, prompts=["<s>ab", "<s>"], num_rollouts=8)
    assert {tuple(prompt) for prompt, _ in sampled} == {(BOS, 4, 5), (BOS,)}
    prompts = batch.attention_mask & ~batch.response_mask
    assert ((batch.tokens == BOS) & prompts).sum(dim=1).tolist() == [1] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_off_response_ends_with_one_eos_that_is_trained(tmp_path, kind):
    config = tiny_config(
        tmp_path,
        "PPO",
        tokenizer={"tokenizer_path": char_tokenizer(**KINDS[kind])},
        train={"total_steps": 1},
        method={"num_rollouts": 32, "chunk_size": 8},
    )
    stops = list("abcdefghijklm")
    trainer = trlx.train(config=config, reward_fn=share_of_a, prompts=PROMPTS, stop_sequences=stops)
    batch, short = trainer.store, 0
    for tokens, mask in zip(batch.tokens, batch.response_mask, strict=True):
        response = tokens[mask].tolist()
        assert EOS not in response[:-1] and not set(response) & set(range(4, 4 + len(stops)))
        short += len(response) < 6
        assert len(response) == 6 or response[-1] == EOS
    assert short > 8


@pytest.mark.parametrize("kind", KINDS)
def test_samples_end_with_one_eos_that_is_trained(tmp_path, kind):
    config = tiny_config(
        tmp_path, "SFT", tokenizer={"tokenizer_path": char_tokenizer(**KINDS[kind])}, train={"total_steps": 1}
    )
    samples = ["ab", "ab</s>", ["ab", "c"], ["ab", "c</s>"]]
    trainer = trlx.train(config=config, samples=samples)
    batch = trainer.store.rows([0, 1, 2, 3])
    start = EOS if kind == "no bos" else BOS
    pair = [BOS, 4, 5, 6, EOS] if "prepends" in kind else [4, 5, 6, EOS]
    rows = [ids[mask].tolist() for ids, mask in zip(batch.tokens, batch.attention_mask, strict=True)]
    assert rows == [[start, 4, 5, EOS]] * 2 + [pair] * 2
    trained = [ids[mask].tolist() for ids, mask in zip(batch.tokens, batch.response_mask, strict=True)]
    assert trained == [[4, 5, EOS]] * 2 + [[6, EOS]] * 2


@pytest.mark.parametrize("kind", ["plain", "prepends bos", "no bos"])
def test_evaluations_and_generate_begin_as_rollouts_do_also_where_no_prompts_are_given(tmp_path, kind):
    tokenizer = {"tokenizer_path": char_tokenizer(**KINDS[kind])}
    config = tiny_config(tmp_path, "SFT", tokenizer=tokenizer, train={"total_steps": 0})
    begun = [[BOS, 4, 5]] if kind == "prepends bos" else [[4, 5]]
    for given, wanted in ((["ab"], begun), (None, [[EOS if kind == "no bos" else BOS]] * 4)):
        trainer = trlx.train(config=config, samples=["ab"], eval_prompts=given)
        assert [prompt.ids for prompt in trainer.evaluator.prompts] == wanted
    asked = []
    trainer.sampler.generate = lambda prompts, sampling: asked.extend(prompts) or [Sample([EOS])]
    assert trainer.generate("ab") == "" and asked == begun
