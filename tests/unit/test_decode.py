"""The loop that samples on the Accelerate backend: the same tokens as transformers' generate, from fewer passes."""

from contextlib import contextmanager

import pytest
import torch

from tests.builders import VOCABULARY, char_tokenizer, tiny_gpt2
from tests.runs import run
from tests.unit.test_families import CHOSEN
from tests.unit.tiny_models import tiny_model
from trlx.models.adapters import build_adapted_policy
from trlx.models.cached import Reader
from trlx.models.policy import build_policy
from trlx.sampling.decode import DecodingSampler
from trlx.sampling.drawing import uniforms
from trlx.sampling.generate import TransformersSampler
from trlx.sampling.settings import SamplingConfig
from trlx.sampling.stopping import Stopper

PROMPTS = [[9, 10], [4, 5, 6, 7, 8, 9, 10], [9, 10], [11], [12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25]]
ENDS = list(range(28, 38))
SAYING_MORE = {"repetition_penalty": 3.0}
"""Keeps the greedy responses of a tiny model from being one token over and over."""


def greedy(policy, **given):
    """The responses of the loop, which are those of generate."""
    extra = given.pop("extra", SAYING_MORE)
    sampling = SamplingConfig(12, do_sample=False, extra=extra, **given)
    own, plain = (kind(policy, "cpu").generate(PROMPTS, sampling) for kind in (DecodingSampler, TransformersSampler))
    assert not any(sample.logprobs for sample in own)
    # generate goes on behind a stop sequence until all rows are done
    cut = sampling.stop.finish if sampling.stop else lambda ids: ids
    found = [cut(sample.ids) for sample in own]
    assert found == [cut(sample.ids) for sample in plain]
    return found


def drawn(policy, seed=0, prompts=PROMPTS, places=None, **given):
    torch.manual_seed(seed)
    sampling = SamplingConfig(**{"max_new_tokens": 8, "eos_token_id": ENDS, **given})
    sampler = DecodingSampler(policy, "cpu", places=places)
    sampler._model_of_generate = None  # it would read a few tokens to find out
    return sampler.generate(prompts, sampling)


@contextmanager
def noted(module, shape):
    """What `shape` returns for the arguments of each call of a module inside the block."""
    found = []
    hook = module.register_forward_pre_hook(lambda _, args, named: found.append(shape(args, named)), with_kwargs=True)
    yield found
    hook.remove()


@pytest.fixture(scope="module")
def policy():
    return build_policy(tiny_gpt2(initializer_range=0.3))


@pytest.mark.parametrize("name", [*CHOSEN, "gpt_neo", "opt_projected", "mpt", "falcon_alibi", "gemma3"])
def test_greedy_responses_are_those_of_generate_in_every_family(name):
    policy = build_policy(tiny_model(name))
    assert len({*map(len, greedy(policy, eos_token_id=ENDS))}) > 1
    assert DecodingSampler(policy, "cpu")._model_of_generate is None


def test_greedy_responses_are_those_of_generate_with_every_kind_of_rule(policy):
    found = greedy(policy)
    mask = torch.rand(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)) < 0.5
    stop = Stopper(char_tokenizer(), [char_tokenizer().decode(row[3:5]) for row in found[1::3]])
    for given in (
        {"stop": stop, "eos_token_id": 2},
        {"eos_token_id": [row[0] for row in found], "min_new_tokens": 5},
        {"extra": {**SAYING_MORE, "logit_mask": mask}},
        {"extra": {"no_repeat_ngram_size": 1}, "eos_token_id": ENDS, "stop": stop},
        {"extra": {"num_beams": 3}},
    ):
        assert greedy(policy, **given) != found
    q = build_policy(policy.model, value_head=True, q_heads=2)
    assert greedy(q, extra={**SAYING_MORE, "beta": 50}) != found


def test_greedy_responses_are_those_of_generate_with_an_adapter():
    settings = {"peft_type": "LORA", "r": 4, "init_lora_weights": False}
    adapted = build_adapted_policy(tiny_gpt2(initializer_range=0.3), settings)
    assert greedy(adapted) != greedy(build_policy(tiny_gpt2(initializer_range=0.3)))
    assert DecodingSampler(adapted, "cpu")._model_of_generate is None
    virtual = build_adapted_policy(tiny_gpt2(), {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2})
    greedy(virtual)
    assert "more than the tokens" in DecodingSampler(virtual, "cpu")._model_of_generate


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_token_is_where_the_summed_probabilities_exceed_the_number_of_its_row_and_step(policy, temperature):
    samples = drawn(policy, seed=3, temperature=temperature)
    assert len({len(sample.ids) for sample in samples}) > 2
    torch.manual_seed(3)
    numbers = uniforms(int(torch.randint(2**62, ())), len(PROMPTS), 8)
    for prompt, sample, row in zip(PROMPTS, samples, numbers, strict=True):
        tokens = torch.tensor([[*prompt, *sample.ids]])
        logits = policy.model(tokens).logits[0, len(prompt) - 1 : -1] / temperature
        sums = logits.double().softmax(-1).cumsum(-1)
        chosen = [int((row[step] > each).sum()) for step, each in enumerate(sums)]
        assert sample.ids == chosen
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(sample.logprobs), logprobs, atol=1e-5, rtol=0)


def test_tokens_come_as_often_as_they_are_likely():
    policy = build_policy(tiny_gpt2(vocab_size=8, initializer_range=0.3))
    expected = policy.model(torch.tensor([[4, 5]])).logits[0, -1].softmax(-1)
    samples = drawn(policy, prompts=[[4, 5]] * 4000, max_new_tokens=1, eos_token_id=None)
    shares = torch.bincount(torch.tensor([sample.ids[0] for sample in samples]), minlength=8) / 4000
    assert expected.max() > 0.2
    torch.testing.assert_close(shares, expected, atol=0.025, rtol=0)  # three standard deviations


def test_a_row_does_not_depend_on_those_beside_it(policy):
    whole = drawn(policy)
    assert [sample.ids for sample in drawn(policy, prompts=PROMPTS[:2])] == [sample.ids for sample in whole[:2]]
    assert drawn(policy, seed=1) != whole
    assert whole[0].ids != whole[2].ids  # samples of one prompt
    changed = [PROMPTS[0], *([7] * 9 for _ in PROMPTS[1:])]
    assert drawn(policy, prompts=changed)[0].ids == whole[0].ids


@pytest.mark.parametrize(
    "given",
    [
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_new_tokens": 2},
        {"extra": {"repetition_penalty": 1.5}},
        {"extra": {"min_p": 0.2}},
        {"extra": {"logit_mask": torch.zeros(VOCABULARY, VOCABULARY)}},
    ],
)
def test_log_probabilities_are_said_where_nothing_but_temperature_shapes_the_policy(policy, given):
    assert all(sample.logprobs is None for sample in drawn(policy, **given))
    assert all(len(sample.logprobs) == len(sample.ids) for sample in drawn(policy, extra={"min_p": None}))


def test_equal_prompts_are_read_once_and_rows_that_ended_leave_with_their_padding(policy):
    sampler = DecodingSampler(policy, "cpu")
    sampling = SamplingConfig(12, do_sample=False, eos_token_id=ENDS, extra=SAYING_MORE)
    # 8 rows end at once, two of five tokens go on
    first = [sample.ids[0] for sample in sampler.generate([[5] * 20, [4, 5, 6, 7, 8]], sampling)]
    assert first[0] != first[1]
    sampling = SamplingConfig(3, do_sample=False, eos_token_id=first[0])
    with noted(
        policy.model.transformer, lambda args, named: (*args[0].shape, named["attention_mask"].shape[1])
    ) as shapes:
        samples = sampler.generate([[4, 5, 6, 7, 8], *[[5] * 20] * 8, [4, 5, 6, 7, 8]], sampling)
    assert [sample.ids for sample in samples[1:9]] == [first[:1]] * 8
    assert samples[0].ids == samples[9].ids and len(samples[0].ids) == 3
    # the prompts in two groups without padding, then two rows of five tokens and the new ones
    assert shapes == [(1, 20, 20), (1, 5, 5), (2, 1, 6), (2, 1, 7)]


QUEUE = [[token] * length for token, length in zip(range(4, 16), [3, 1, 6, 2, 9, 4, 1, 2, 5, 3, 7, 2], strict=True)]


def test_prompts_that_wait_take_the_places_of_rows_that_ended(policy):
    """With 2 places, every draw is of 2 rows until no prompt waits, and no row that has ended is drawn again."""
    whole = drawn(policy, prompts=QUEUE)
    lengths = [len(sample.ids) for sample in whole]
    assert min(lengths) < max(lengths) == 8  # some end at their limit, while others go on
    with noted(policy.model.lm_head, lambda args, _: len(args[0])) as rows:
        queued = drawn(policy, prompts=QUEUE, places=2)
    alone = rows.count(1)
    assert rows == [2] * ((sum(lengths) - alone) // 2) + [1] * alone and alone < 8
    assert_alike(queued, whole)


@pytest.mark.parametrize("places", [1, 3, 14])
def test_a_queue_gives_the_same_samples_as_all_prompts_at_once(places):
    policy = build_policy(tiny_model("llama"), value_head=True)
    for parameter in policy.value_head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    stop = Stopper(char_tokenizer(), ["a", "z b"])
    for given in ({}, {"stop": stop, "min_new_tokens": 3}, {"extra": {"no_repeat_ngram_size": 1}}):
        asked = {"prompts": [*QUEUE, *PROMPTS, *PROMPTS[:1] * 3, *([30, *each] for each in QUEUE)], **given}
        with noted(policy.model.model, lambda args, _: len(args[0])) as rows:
            queued = drawn(policy, places=places, **asked)
        assert places - 1 <= max(rows) <= places
        assert_alike(queued, drawn(policy, **asked))


def test_prompts_that_wait_are_read_when_a_quarter_of_the_places_is_free(policy, monkeypatch):
    read, join = [], Reader.join
    monkeypatch.setattr(
        Reader, "join", lambda self, prompts, copies: read.append(sum(copies)) or join(self, prompts, copies)
    )
    drawn(policy, prompts=[*QUEUE, *([30, *each] for each in QUEUE)], places=8)
    assert read[0] == 8 and sum(read) == 24 and min(read[:-1]) >= 2


def test_a_row_at_its_limit_leaves_at_once_because_the_model_may_have_no_position_for_more(policy):
    asked = {"prompts": [[1 + row % 30, 5 + row // 30] for row in range(100)], "max_new_tokens": 3}
    assert_alike(drawn(policy, places=12, **asked), drawn(policy, **asked))  # once it is the only one of 12 that ended


def assert_alike(found, expected):
    assert [sample.ids for sample in found] == [sample.ids for sample in expected]
    for name in ("logprobs", "values"):
        pairs = [(getattr(one, name), getattr(other, name)) for one, other in zip(found, expected, strict=True)]
        for one, other in pairs:
            assert (one is None) == (other is None)
            torch.testing.assert_close(torch.tensor(one or []), torch.tensor(other or []), atol=1e-5, rtol=0)


def test_samples_of_one_prompt_wait_until_all_fit_and_read_it_once(policy):
    prompts = [[5] * 4] * 2 + [[6, 7, 8]] * 2 + [[9, 9]] * 5
    with noted(policy.model.transformer, lambda args, _: tuple(args[0].shape)) as shapes:
        found = drawn(policy, prompts=prompts, places=3)
    # five samples do not fit in three places
    assert sorted(shape for shape in shapes if shape[1] > 1) == [(1, 2), (1, 2), (1, 3), (1, 4)]
    assert max(shapes)[0] == 3
    assert_alike(found, drawn(policy, prompts=prompts))


def test_generate_holds_no_more_rows_than_there_are_places(policy):
    sampler = DecodingSampler(policy, "cpu", places=4)
    with noted(policy.model.transformer, lambda args, _: len(args[0])) as rows:
        assert (
            len(sampler.generate(PROMPTS, SamplingConfig(2, extra={"num_beams": 1, "begin_suppress_tokens": [7]}))) == 6
        )
    assert rows == [4, 4, 2, 2]
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="train.sampler.places must be a whole number of at least 1, got"):
            DecodingSampler(policy, "cpu", places=wrong)


def test_what_the_loop_does_not_know_goes_through_generate_and_is_said_once(caplog):
    caplog.set_level("INFO")
    sampler = DecodingSampler(build_policy(tiny_gpt2()), "cpu")
    for _ in range(2):
        for extra in ({"num_beams": 2}, {"num_beams": 1, "num_return_sequences": 1, "top_p": 1.0}):
            sampler.generate([[4]], SamplingConfig(2, extra=extra))
    assert caplog.text.count("generate draws the samples") == 1
    assert "transformers' generate draws the samples, because method.gen_kwargs.num_beams has no rule" in caplog.text
    mamba = DecodingSampler(build_policy(tiny_model("mamba")), "cpu")
    assert len(mamba.generate([[4, 5], [6]], SamplingConfig(2))) == 2
    assert "because MambaForCausalLM prepares its inputs in its own way" in caplog.text
    forcing = tiny_gpt2()
    forcing.generation_config.forced_eos_token_id = 7
    samples = DecodingSampler(build_policy(forcing), "cpu").generate([[4], [5]], SamplingConfig(3))
    assert [sample.ids[-1] for sample in samples] == [7, 7]


def test_train_sampler_generate_is_generate_for_everything(tmp_path):
    trainer = run("SFT", tmp_path / "own", train={"total_steps": 0})
    assert type(trainer.sampler) is DecodingSampler and trainer.sampler.places is None
    trainer = run("SFT", tmp_path / "few", train={"total_steps": 0, "sampler": {"engine": "auto", "places": 3}})
    assert trainer.sampler.places == 3
    trainer = run("SFT", tmp_path / "theirs", train={"total_steps": 0, "sampler": "generate"})
    assert isinstance(trainer.sampler, TransformersSampler) and not isinstance(trainer.sampler, DecodingSampler)
    with pytest.raises(ValueError, match="train.sampler generate does not work with a NeMo trainer: leave it out"):
        type(trainer.sampler)(backend=None, tokenizer=None)
