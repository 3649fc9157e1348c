import pytest

from tests.builders import VOCABULARY, tiny_gpt2
from tests.builders import responses as drawn
from trlx.batch import Sample
from trlx.data.prompts import Prompt
from trlx.models.policy import build_policy
from trlx.sampling.decode import DecodingSampler
from trlx.sampling.generate import TransformersSampler
from trlx.sampling.settings import SamplingConfig, check_rollouts, cut_at_eos, sweep, sweep_variants
from trlx.sampling.stopping import Stopper


def test_settings_are_completed_with_the_tokenizers_tokens(tokenizer):
    stop = Stopper(tokenizer, ["#"])
    sampling = SamplingConfig.from_kwargs({"max_new_tokens": 8, "beta": 1, "top_p": 0.9}, tokenizer, stop)
    assert sampling == SamplingConfig(
        max_new_tokens=8, top_p=0.9, eos_token_id=2, pad_token_id=0, stop=stop, extra={"beta": 1}
    )
    assert sampling.do_sample
    assert sampling.eos_token_ids == [2]


def test_own_tokens_win_over_the_tokenizers_and_eos_may_be_several(tokenizer):
    sampling = SamplingConfig.from_kwargs({"max_new_tokens": 8, "eos_token_id": [2, 9], "pad_token_id": 7}, tokenizer)
    assert (sampling.eos_token_ids, sampling.pad_token_id) == ([2, 9], 7)


def test_no_eos_ends_nothing():
    assert SamplingConfig().eos_token_ids == []


def test_whole_numbers_may_be_written_as_floats(tokenizer):
    sampling = SamplingConfig.from_kwargs({"max_new_tokens": 8.0, "top_k": 0.0}, tokenizer)
    assert [type(sampling.max_new_tokens), type(sampling.top_k)] == [int, int]


def test_none_stands_for_the_default(tokenizer):
    sampling = SamplingConfig.from_kwargs({"max_new_tokens": 8, "top_k": None, "penalty_alpha": None}, tokenizer)
    assert (sampling.top_k, sampling.extra) == (0, {})


def test_what_a_backend_decides_by_itself_is_left_to_it(tokenizer):
    assert SamplingConfig.from_kwargs({"max_new_tokens": 8, "use_cache": True}, tokenizer).extra == {}


def test_temperature_zero_is_greedy(tokenizer):
    sampling = SamplingConfig.from_kwargs({"max_new_tokens": 8, "temperature": 0.0}, tokenizer)
    assert (sampling.do_sample, sampling.temperature) == (False, 1.0)


def test_logprobs_are_taken_at_the_temperature_sampled_with():
    assert SamplingConfig(temperature=0.7).logprob_temperature == 0.7
    assert SamplingConfig(temperature=0.7, do_sample=False).logprob_temperature == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": None}, "max_new_tokens is missing"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be"),
        ({"max_new_tokens": True}, "max_new_tokens must be"),
        ({"max_new_tokens": "8"}, "max_new_tokens must be"),
        ({"min_new_tokens": -1}, "min_new_tokens must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "gen_kwargs.temperature must be a number, got '1'"),
        ({"top_p": True}, "gen_kwargs.top_p must be a number, got True"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"beta": [0, 1]}, "beta is the list .*gen_experience_kwargs"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig.from_kwargs({"max_new_tokens": 8, **changes}, tokenizer)


def test_the_callers_settings_are_not_changed(tokenizer):
    mine = {"max_new_tokens": 8.0, "temperature": 0}
    SamplingConfig.from_kwargs(mine, tokenizer)
    assert mine == {"max_new_tokens": 8.0, "temperature": 0}
    assert type(mine["max_new_tokens"]) is float


def test_a_list_of_values_is_a_sweep():
    settings = {"max_new_tokens": 8, "beta": [0, 1]}
    assert sweep(settings) == ("beta", [0, 1])
    assert sweep_variants(settings) == [
        ("@beta=0", {"max_new_tokens": 8, "beta": 0}),
        ("@beta=1", {"max_new_tokens": 8, "beta": 1}),
    ]


@pytest.mark.parametrize("name", ["eos_token_id", "bad_words_ids", "suppress_tokens", "logit_mask"])
def test_a_list_that_is_one_value_is_no_sweep(tokenizer, name):
    settings = {"max_new_tokens": 8, name: [1, 2]}
    assert sweep(settings) == (None, [])
    assert sweep_variants(settings) == [("", settings)]
    assert SamplingConfig.from_kwargs(settings, tokenizer).max_new_tokens == 8


def test_only_one_argument_can_be_swept():
    with pytest.raises(ValueError, match="beta and top_k"):
        sweep({"beta": [0, 1], "top_k": [1, 2]})
    with pytest.raises(ValueError, match="empty list"):
        sweep({"beta": []})


def test_a_response_ends_with_its_first_eos():
    assert cut_at_eos([5, 2, 6, 2], [2]) == [5, 2]
    assert cut_at_eos([5, 6, 9], [2, 6]) == [5, 6]
    assert cut_at_eos([5, 6], [2]) == [5, 6]
    assert cut_at_eos([5, 2], []) == [5, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temprature": 0.5}, "Unknown key 'method.gen_kwargs.temprature'. Did you mean 'temperature'"),
        ({"topk": 5}, "Unknown key 'method.gen_kwargs.topk'. Did you mean 'top_k'"),
        ({"betta": None}, "Unknown key 'method.gen_kwargs.betta'. Did you mean 'beta'"),
        (
            {"max_tokens": 5},
            "Unknown key 'method.gen_kwargs.max_tokens'. Write method.gen_kwargs.max_new_tokens instead",
        ),
        ({"streamer": 1}, "Unknown key 'method.gen_kwargs.streamer'. Known are the settings of transformers'"),
        (
            {"num_return_sequences": 2},
            "num_return_sequences is 2, but every prompt gets one response: repeat",
        ),
        ({"stop_strings": ["a"]}, r"stop_strings is .*pass trlx.train\(stop_sequences"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is True, but trlx reads only the tokens"),
        ({"penalty_alpha": 0.5}, "penalty_alpha is 0.5, but transformers no longer"),
    ],
)
def test_a_setting_that_nobody_knows_or_heeds_is_refused(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig.from_kwargs({"max_new_tokens": 8, **changes}, tokenizer)


def test_every_setting_of_transformers_that_works_is_known(tokenizer):
    plain = {"num_return_sequences": 1, "return_dict_in_generate": False, "penalty_alpha": 0}
    others = {"num_beams": 2, "min_p": 0.1, "repetition_penalty": 1.2, "min_length": 3, "beta": 1, "logit_mask": True}
    sampling = SamplingConfig.from_kwargs({"max_new_tokens": 8, **plain, **others}, tokenizer)
    assert sampling.extra == plain | others


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0}, "method.gen_kwargs asks for the likeliest token always .*gen_experience_kwargs"),
        ({"do_sample": False}, "method.gen_kwargs asks for the likeliest token always"),
        ({"num_beams": 4}, "method.gen_kwargs.num_beams searches for likely responses"),
    ],
)
def test_rollouts_must_be_drawn(kwargs, message):
    check_rollouts({"max_new_tokens": 8, "do_sample": True, "num_beams": 1, "temperature": 0.1}, "method.gen_kwargs")
    with pytest.raises(ValueError, match=message):
        check_rollouts(kwargs, "method.gen_kwargs")


def test_a_mask_or_beta_that_a_model_cannot_follow_is_refused():
    SamplingConfig(extra={"beta": 1, "logit_mask": [[True, False], [False, True]]}).check_shaping(True, 2)
    with pytest.raises(ValueError, match="gen_kwargs.beta is 0, but only ILQL has the Q heads"):
        SamplingConfig(extra={"beta": 0}).check_shaping(False, 2)
    for mask, shape in (([[True]], r"\[1, 1\]"), ([[True], [True, False]], "of no table"), ("yes", "of no table")):
        with pytest.raises(ValueError, match=rf"logit_mask has the shape {shape}.*make it \[2, 2\]"):
            SamplingConfig(extra={"logit_mask": mask}).check_shaping(True, 2)


def test_a_response_ended_by_an_eos_or_a_stop_sequence_and_not_where_tokens_ran_out(tokenizer):
    sampling = SamplingConfig(eos_token_id=[7, 8], stop=Stopper(tokenizer, ["#"]))
    stop = tokenizer("#", add_special_tokens=False)["input_ids"]
    prompts = [Prompt([4], metadata={"label": i}) for i in range(4)]
    responses = [[5, 8], [5, *stop, 9], [5, 2], []]
    rollouts = [sampling.rollout(*pair) for pair in zip(prompts, map(Sample, responses), strict=True)]
    assert [rollout.response for rollout in rollouts] == [[5, 8], [5, 2], [5, 2], []]
    assert [rollout.ended for rollout in rollouts] == [True, True, False, False]
    assert [rollout.metadata["label"] for rollout in rollouts] == [0, 1, 2, 3]


PENALTY = {"repetition_penalty": 5.0}
"""Keeps the greedy responses of a tiny model from being one token over and over."""


def test_every_eos_of_a_list_ends_a_response(model):
    policy, prompts = build_policy(model), [[4], [9, 10]]
    first, second = drawn(policy, prompts, SamplingConfig(6, do_sample=False, extra=PENALTY))
    assert len({*first, *second, 35}) == 12  # of 11 tokens that come no other is one of these three
    sampling = SamplingConfig(6, do_sample=False, eos_token_id=[35, second[3], first[1]], extra=PENALTY)
    for kind in (TransformersSampler, DecodingSampler):
        sampler, passes = kind(policy, "cpu"), []
        drawn(sampler, prompts[:1], sampling)  # the loop checks the model in its first call
        hook = model.transformer.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        assert drawn(sampler, prompts, sampling) == [first[:2], second[:4]]
        hook.remove()
        assert len(passes) == 4  # and none after the end of the longer one


def test_the_least_number_of_tokens_does_not_count_the_prompt(model):
    # every token but 7 ends a response
    eos = [token for token in range(VOCABULARY) if token != 7]
    for least in (0, 1, 3):
        sampling = SamplingConfig(6, least, do_sample=False, eos_token_id=eos, extra=PENALTY)
        for row in drawn(build_policy(model), [[4], [9, 10]], sampling):
            assert row[:least] == [7] * least and len(row) == least + 1


def test_padding_and_other_prompts_are_not_taken_for_what_a_row_said(model):
    policy = build_policy(model)
    for prompts, settings in (([[4], [9, 10]], {}), ([[4], [9]], {"num_beams": 2})):
        sampling = SamplingConfig(6, do_sample=False, pad_token_id=10, extra={**PENALTY, **settings})
        alone = [drawn(policy, [prompt], sampling)[0] for prompt in prompts]
        assert alone[0][0] == 10 or settings  # which stands in front of the shorter prompt
        assert drawn(policy, prompts, sampling) == alone


def test_responses_are_drawn_without_dropout_whatever_mode_the_model_is_in():
    policy = build_policy(tiny_gpt2(resid_pdrop=0.5))
    sampling = SamplingConfig(6, do_sample=False, extra=PENALTY)
    assert drawn(policy.train(), [[4]], sampling) == drawn(policy.eval(), [[4]], sampling)


def test_a_models_own_generation_settings_change_nothing_and_stay_as_they_are(model):
    policy, sampling = build_policy(model), SamplingConfig(6, do_sample=False)
    before = drawn(policy, [[4]], sampling)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert drawn(policy, [[4]], sampling) == before
    assert model.generation_config.repetition_penalty == 5.0
