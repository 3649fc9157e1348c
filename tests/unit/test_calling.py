"""What reward_fn and metric_fn are called with."""

import functools

import pytest
import torch

from tests.builders import char_tokenizer
from trlx.batch import Rollout
from trlx.rewards import NumberMatch
from trlx.rewards.calling import OFFERED, Arguments, RewardError, UserFunction
from trlx.rewards.scoring import Metric, Scorer

CHAT = [{"role": "user", "content": "ab"}]
ROLLOUTS = [
    Rollout([1, 4, 5], [6, 2], metadata={"label": "x"}, ended=True),
    Rollout([0, 4], [6, 7, 6], metadata={"label": "y"}, messages=CHAT),
]
TEXTS = {"samples": ["abc", "acdc"], "prompts": ["ab", "a"], "outputs": ["c", "cdc"]}


def asked_of(fn, rollouts=ROLLOUTS, unasked=OFFERED[:4], **how):
    """What `fn`, which returns its arguments, is called with; without the tokenizer."""
    got = UserFunction("reward_fn", fn, unasked)(Arguments(rollouts, char_tokenizer(), **how))
    return {name: value for name, value in got.items() if name != "tokenizer"}


def everything(**kwargs):
    return kwargs


def test_neither_samples_nor_outputs_carry_eos_unless_asked_to_where_the_response_ended(tokenizer):
    def texts(**how):
        offered = Arguments(ROLLOUTS, tokenizer, **how).offered
        return {name: offered[name] for name in TEXTS}

    assert texts() == TEXTS
    assert texts(eos_in_outputs=True) == {**TEXTS, "samples": ["abc</s>", "acdc"], "outputs": ["c</s>", "cdc"]}
    assert texts(separator="<sep>") == {**TEXTS, "samples": ["ab<sep>c", "a<sep>cdc"]}


def test_a_function_that_takes_anything_gets_what_it_always_got():
    assert asked_of(everything) == {**TEXTS, "label": ["x", "y"]}
    assert "tokenizer" in UserFunction("reward_fn", everything, OFFERED[:4])(Arguments(ROLLOUTS, char_tokenizer()))


def test_a_function_gets_what_it_names_and_nothing_else():
    assert asked_of(lambda samples, prompts, outputs: locals()) == TEXTS
    assert asked_of(lambda outputs: locals()) == {"outputs": ["c", "cdc"]}
    assert asked_of(lambda *, outputs, label, other=3: locals()) == {
        "outputs": ["c", "cdc"],
        "label": ["x", "y"],
        "other": 3,
    }

    def new(prompt_ids, output_ids, ended, step, messages):
        return locals()

    assert asked_of(new, step=7) == {
        "prompt_ids": [[1, 4, 5], [0, 4]],
        "output_ids": [[6, 2], [6, 7, 6]],
        "ended": [True, False],
        "step": 7,
        "messages": [None, CHAT],
    }


def test_one_that_names_some_and_takes_the_rest_gets_both():
    got = asked_of(lambda outputs, ended, **rest: {"outputs": outputs, "ended": ended, **rest})
    assert got == {**TEXTS, "label": ["x", "y"], "ended": [True, False]}


class Judge:
    def __call__(self, outputs, ended):
        return locals()

    def method(self, outputs, ended):
        return locals()


@pytest.mark.parametrize(
    "fn",
    [
        Judge(),
        Judge().method,
        functools.partial(lambda weight, outputs, ended: {"outputs": outputs, "ended": ended}, 2.0),
        functools.partial(lambda outputs, ended, weight: {"outputs": outputs, "ended": ended}, weight=2.0),
        torch.no_grad()(lambda outputs, ended: {"outputs": outputs, "ended": ended}),
    ],
)
def test_objects_methods_partials_and_decorated_functions_are_asked_as_functions_are(fn):
    got = asked_of(fn)
    assert (got["outputs"], got["ended"]) == (["c", "cdc"], [True, False])
    assert got.keys() <= {"self", "outputs", "ended"}


def test_a_wrapper_may_take_more_than_what_it_wraps():
    def inner(outputs):
        return outputs

    @functools.wraps(inner)
    def wrapper(label, **kwargs):
        return {"label": label, **kwargs}

    assert asked_of(wrapper) == {"label": ["x", "y"], "outputs": ["c", "cdc"]}


def test_a_function_whose_signature_nobody_can_tell_gets_what_it_always_got():
    assert asked_of(dict) == {**TEXTS, "label": ["x", "y"]}


def test_a_key_of_the_prompts_goes_before_a_newer_argument_of_its_name():
    rollouts = [Rollout([4], [5], metadata={"messages": "mine", "step": 3})]
    assert asked_of(lambda messages, step: locals(), rollouts) == {"messages": ["mine"], "step": [3]}
    assert asked_of(everything, rollouts)["messages"] == ["mine"]


def test_token_ids_are_copies():
    rollouts = [Rollout([4], [5])]

    def spoil(prompt_ids, output_ids):
        prompt_ids[0].clear(), output_ids[0].clear()
        return [0.0]

    Scorer(spoil, char_tokenizer()).score(rollouts)
    assert (rollouts[0].prompt, rollouts[0].response) == ([4], [5])


def test_what_a_function_asks_for_in_vain_is_named_before_it_is_called():
    def wanting(samples, lable, other=1, *args, **kwargs):
        return [0.0] * len(samples)

    function = UserFunction("reward_fn", wanting, ())
    function.check(["lable"])
    with pytest.raises(
        ValueError, match=r"reward_fn asks for 'lable'.* Did you mean 'label'\? There are samples, .*messages, label"
    ):
        function.check(["label"])
    Scorer(lambda ended, **kwargs: [], char_tokenizer()).check([])
    with pytest.raises(ValueError, match="metric_fn asks for 'lable'"):
        Metric(wanting).check([])
    with pytest.raises(TypeError, match="reward_fn must be a function, got 3"):
        Scorer(3, char_tokenizer())
    with pytest.raises(
        TypeError, match=r"got 'judge': for a classifier write trlx.SequenceClassifierReward\('judge'\)"
    ):
        Scorer("judge", char_tokenizer())
    with pytest.raises(
        TypeError, match=r"reward_fn's 'right' must be a function, got the class .*: write NumberMatch\(\)"
    ):
        Scorer({"right": NumberMatch}, char_tokenizer())
    for theirs, ours in (("completions", "outputs"), ("completion_ids", "output_ids")):
        with pytest.raises(ValueError, match=f"asks for '{theirs}'.* Did you mean '{ours}'"):
            Scorer(eval(f"lambda prompts, {theirs}, **kwargs: []"), char_tokenizer()).check(["answer"])

    async def later(samples):
        return {}

    with pytest.raises(TypeError, match="metric_fn must be a plain function: write def in place of async def"):
        Metric(later)


def test_metric_fn_gets_texts_and_metadata_and_the_rest_where_it_asks():
    got = {}
    arguments = Arguments(ROLLOUTS, char_tokenizer(), step=4)
    Metric(lambda **given: got.update(given) or {})(arguments)
    assert got == {**TEXTS, "label": ["x", "y"]}
    Metric(lambda tokenizer, step: got.update(tokenizer=tokenizer.decode([4]), step=step) or {})(arguments)
    assert (got["tokenizer"], got["step"]) == ("a", 4)


def test_an_exception_is_the_cause_of_the_error():
    def broken(**given):
        raise KeyError("model")

    with pytest.raises(RewardError, match="reward_fn raised KeyError: 'model'; first sample: 'abc'") as caught:
        asked_of(broken)
    assert isinstance(caught.value.__cause__, KeyError)
