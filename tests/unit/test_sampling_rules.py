"""What is done to logits before a token is drawn: by hand-worked numbers, and as transformers' generate does it."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from tests.builders import responses, tiny_gpt2
from tests.unit.test_seq2seq import CONFIGS
from trlx.models.architecture import EncoderDecoder
from trlx.models.policy import build_policy, load_model
from trlx.sampling.generate import TransformersSampler
from trlx.sampling.rules import KNOWN, Rules
from trlx.sampling.settings import SamplingConfig, cut_at_eos

FIELDS = ("do_sample", "temperature", "top_k", "top_p", "min_new_tokens", "eos_token_id", "pad_token_id")
NEVER = -math.inf
HALVES = [math.log(each) for each in (0.5, 0.25, 0.125, 0.125)]


def settings(max_new_tokens=6, **given):
    """The settings of transformers by their names, whether they are fields or extra."""
    own = {name: given.pop(name) for name in FIELDS if name in given}
    return SamplingConfig(max_new_tokens=max_new_tokens, extra=given, **own)


def changed(logits, rows, step=0, heads=None, **given):
    """`logits` of every row after the rules."""
    rules = Rules(settings(**given), torch.device("cpu"), heads)
    last = torch.tensor([row[-1] for row in rows])
    return rules(torch.tensor([logits] * len(rows)), last, lambda: rows, step, torch.zeros(len(rows), 2)).tolist()


def kept(**given):
    """The tokens that can still be drawn of four with the probabilities 1/2, 1/4, 1/8, 1/8."""
    return [token for token, logit in enumerate(changed(HALVES, [[0]], **given)[0]) if logit > NEVER]


class Q(nn.Module):
    def lowest_target(self, hidden):
        return torch.tensor([[0.0, 1.0]])


class Value(nn.Module):
    def forward(self, hidden):
        return torch.tensor([0.25])


HEADS = nn.ModuleDict({"q": Q(), "value": Value()})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # a positive logit is divided, a negative one multiplied; each row by what it holds, whatever its length
        ({"repetition_penalty": 2.0}, [[1.0, 1.0, -2.0], [2.0, 0.5, -1.0]]),
        ({"no_repeat_ngram_size": 1}, [[NEVER, 1.0, NEVER], [2.0, NEVER, -1.0]]),
        ({"no_repeat_ngram_size": 2}, [[2.0, 1.0, NEVER], [2.0, 1.0, -1.0]]),
        ({"bad_words_ids": [[1], [0, 2]]}, [[2.0, NEVER, NEVER], [2.0, NEVER, -1.0]]),
        ({"suppress_tokens": [0, 1]}, [[NEVER, NEVER, -1.0]] * 2),
        ({"min_new_tokens": 3, "eos_token_id": [0, 2]}, [[NEVER, 1.0, NEVER]] * 2),
        ({"min_new_tokens": 2, "eos_token_id": [0, 2]}, [[2.0, 1.0, -1.0]] * 2),
        ({"logit_mask": torch.eye(3).bool()}, [[NEVER, 1.0, -1.0], [2.0, NEVER, -1.0]]),
    ],
)
@pytest.mark.parametrize("do_sample", [True, False])
def test_tokens_so_far_decide_what_may_follow(given, expected, do_sample):
    assert changed([2.0, 1.0, -1.0], [[0, 2, 0], [1]], step=2, do_sample=do_sample, **given) == expected


def test_beta_comes_after_the_penalty_and_before_temperature():
    # the penalty makes logits 2, 0 to 1, 0; log softmax is -.3133, -1.3133; 2 (Q - V) is -.5, 1.5; then they are halved
    found = changed([2.0, 0.0], [[0]], heads=HEADS, repetition_penalty=2.0, beta=2, temperature=2.0)
    torch.testing.assert_close(found, [[-0.813262 / 2, 0.186738 / 2]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.7}, [0, 1]),
        ({"min_p": 0.4}, [0, 1]),
        # the entropy is 1.75 log 2; from it the tokens are .75, .25, 1.25 and 1.25 log 2 away
        ({"typical_p": 0.2}, [1]),
        ({"typical_p": 0.6}, [0, 1]),
        ({"epsilon_cutoff": 0.2}, [0, 1]),
        # the least probability is sqrt(.5) 2 ** -1.75 = .21
        ({"eta_cutoff": 0.5}, [0, 1]),
        # temperature 1/2 makes them 16, 4, 1, 1 of 22; temperature 2 makes the quotients 1, .71, .5, .5
        ({"temperature": 0.5, "top_p": 0.7}, [0]),
        ({"temperature": 2.0, "min_p": 0.4}, [0, 1, 2, 3]),
        # what is left has 2/3 and 1/3
        ({"top_k": 2, "top_p": 0.6}, [0]),
        ({"top_p": 0.7, "typical_p": 0.2}, [0]),
        ({"min_p": 0.4, "typical_p": 0.2}, [0]),
        ({"typical_p": 0.6, "epsilon_cutoff": 0.3}, [0, 1]),
        # their entropy is .64: the least probability is sqrt(.5) exp(-.64) = .37
        ({"epsilon_cutoff": 0.2, "eta_cutoff": 0.5}, [0]),
        # a beam that ends leaves another token to go on with
        ({"top_k": 1, "num_beams": 2, "eos_token_id": [1]}, [0, 1]),
    ],
)
def test_likelier_tokens_are_kept_in_the_order_of_generate(given, tokens):
    assert kept(**given) == tokens
    assert kept(**given, do_sample=False) == [0, 1, 2, 3]


def test_values_that_change_nothing_make_no_rule():
    idle = {"repetition_penalty": 1, "no_repeat_ngram_size": 0, "top_k": 0, "min_p": 0, "typical_p": 1, "eta_cutoff": 0}
    rules = Rules(settings(**idle, epsilon_cutoff=0.0, bad_words_ids=None), torch.device("cpu"))
    assert not [*rules.looking_back, *rules.narrowing]


@pytest.mark.parametrize(
    ("name", "value"), [("min_p", 2.0), ("top_k", 1.5), ("bad_words_ids", [1]), ("eta_cutoff", "x")]
)
def test_a_value_that_means_nothing_is_refused_with_its_key(name, value):
    with pytest.raises(ValueError, match=f"method.gen_kwargs.{name} is "):
        Rules(settings(**{name: value}), torch.device("cpu"))


def policies():
    causal = tiny_gpt2(initializer_range=0.4)
    torch.manual_seed(0)
    seq2seq = load_model(CONFIGS["t5"](), {}, EncoderDecoder).eval()
    return {"causal": build_policy(causal), "seq2seq": build_policy(seq2seq, architecture=EncoderDecoder)}


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_samples_are_those_of_plain_generate(kind):
    policy = policies()[kind].eval()
    prompts = [[*range(4, 20)], [*range(20, 36)]]
    plain = {"do_sample": True, "top_k": 0, "eos_token_id": 2, "pad_token_id": 0}
    tokens = torch.tensor(prompts)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    start = tokens.shape[1] if kind == "causal" else 1
    if kind == "seq2seq":
        plain["decoder_start_token_id"] = policy.architecture.start_id
    unchanged = None
    for given in (
        {},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [[token] for token in range(4, 38, 2)]},
        {"suppress_tokens": list(range(4, 38, 2))},
        {"min_new_tokens": 6, "suppress_tokens": list(range(3, 20))},
        {"temperature": 0.3},
        {"top_k": 2},
        {"top_p": 0.4},
        {"min_p": 0.4},
        {"typical_p": 0.3},
        {"epsilon_cutoff": 0.04},
        {"eta_cutoff": 0.2},
        {"repetition_penalty": 2.0, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
        {"num_beams": 2, "top_k": 1},
        {"num_beams": 3, "do_sample": False, "no_repeat_ngram_size": 1},
    ):
        torch.manual_seed(1)
        config = GenerationConfig(max_new_tokens=6, **{**plain, **given})
        if not config.do_sample:
            config.top_k = None
        expected = policy.model.generate(**inputs, generation_config=config)[:, start:].tolist()
        torch.manual_seed(1)
        chosen = {name: value for name, value in {**plain, **given}.items() if name != "decoder_start_token_id"}
        found = responses(TransformersSampler(policy, "cpu"), prompts, settings(**chosen))
        assert found == [cut_at_eos(ids, [2]) for ids in expected], given
        unchanged = unchanged or found
        assert not given or found != unchanged, given


@pytest.mark.parametrize("beams", [1, 2])
def test_padding_does_not_count_as_said_beside_a_longer_prompt(beams):
    policy = policies()["causal"].eval()
    greedy = {"do_sample": False, "num_beams": beams, "eos_token_id": 2, "repetition_penalty": 3.0}
    alone = responses(policy, [[9]], settings(**greedy))[0]
    pad = alone[0]  # were padding said, this token would be penalised
    assert responses(policy, [[5, 6, 7, 8], [9]], settings(**greedy, pad_token_id=pad))[1] == alone


def test_every_rule_is_tested_here():
    source = Path(__file__).read_text()
    assert not [name for name in KNOWN if f'"{name}"' not in source and f"{name}=" not in source]
