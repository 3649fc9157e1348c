"""One token of each row from its logits: numbers worked by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.builders import char_tokenizer
from trlx.backends.megatron.cpu import prepare_engine
from trlx.sampling.drawing import Drawing
from trlx.sampling.settings import SamplingConfig
from trlx.sampling.stopping import Stopper


def drawing(prompts, uniforms=None, heads=None, **settings):
    sampling = SamplingConfig(**{"max_new_tokens": 4, "pad_token_id": 9, **settings})
    if uniforms is None:
        uniforms = torch.full((len(prompts), sampling.max_new_tokens), 0.5)
    return Drawing(sampling, prompts, torch.as_tensor(uniforms, dtype=torch.float64), heads)


def draw(drawing, logits):
    """(tokens, whether rows were done before, and after)."""
    logits = torch.tensor(logits, dtype=torch.float32)
    return tuple(row.tolist() for row in drawing.draw(logits, torch.zeros(len(logits), 2)))


def tokens(logits, uniforms, **settings):
    """One token for each uniform number, all from the same logits."""
    rows = drawing([[0]] * len(uniforms), [[each] for each in uniforms], max_new_tokens=1, **settings)
    return draw(rows, [logits] * len(uniforms))[0]


QUARTERS = [math.log(each) for each in (0.25, 0.5, 0.125, 0.125)]


def test_a_token_is_where_the_summed_probabilities_exceed_the_number():
    # sums are .25 .75 .875 1
    assert tokens(QUARTERS, [0.0, 0.24, 0.26, 0.74, 0.76, 0.87, 0.88, 0.99]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_ends_never_draw_what_is_impossible():
    logits = [-torch.inf, 0.0, 0.0, -torch.inf]
    assert tokens(logits, [0.0, 0.49, 0.51, 1 - 2**-53]) == [1, 1, 2, 2]


def test_temperature_comes_before_the_probabilities():
    # temperature 1/2 squares them: 4 16 1 1 of 22, sums .18 .91 .95 1
    assert tokens(QUARTERS, [0.18, 0.19, 0.90, 0.92, 0.96], temperature=0.5) == [0, 1, 1, 2, 3]


def test_top_k_leaves_the_likeliest():
    # 1/3 and 2/3 of what is left
    assert tokens(QUARTERS, [0.33, 0.34, 0.99], top_k=2) == [0, 1, 1]


def test_top_p_leaves_the_likeliest_that_reach_it():
    assert tokens(QUARTERS, [0.01, 0.99], top_p=0.45) == [1, 1]
    assert tokens(QUARTERS, [0.33, 0.34, 0.99], top_p=0.6) == [0, 1, 1]


def test_top_k_comes_before_top_p():
    # of the two likeliest the second token has 2/3, which is enough; of all tokens it has 1/2, which is not
    assert tokens(QUARTERS, [0.01, 0.99], top_k=2, top_p=0.6) == [1, 1]


def test_temperature_comes_before_top_p():
    # token 1 has .5, at temperature 1/2 .73, and at temperature 2 .37
    assert tokens(QUARTERS, [0.01, 0.99], temperature=0.5, top_p=0.7) == [1, 1]
    assert tokens(QUARTERS, [0.01, 0.99], temperature=2.0, top_p=0.45) == [0, 1]


def test_even_numbers_draw_every_token_as_often_as_it_is_likely():
    uniforms = [(i + 0.5) / 1000 for i in range(1000)]
    for settings, expected in (
        ({}, [250, 500, 125, 125]),
        ({"top_k": 2}, [333, 667, 0, 0]),
        ({"temperature": 0.5}, [182, 727, 45, 46]),
    ):
        found = torch.bincount(torch.tensor(tokens(QUARTERS, uniforms, **settings)), minlength=4)
        assert (found - torch.tensor(expected)).abs().max() <= 1


def test_greedy_takes_the_likeliest_whatever_the_numbers_are():
    assert tokens(QUARTERS, [0.0, 0.99], do_sample=False, temperature=5.0, top_k=3) == [1, 1]


def test_every_step_has_numbers_of_its_own():
    rows = drawing([[0], [0, 0]], [[0.1, 0.9], [0.9, 0.1]], max_new_tokens=2)
    assert draw(rows, [QUARTERS, QUARTERS])[0] == [0, 3]
    assert draw(rows, [QUARTERS, QUARTERS])[0] == [3, 0]


def test_a_row_that_is_done_gets_padding_and_stays_done():
    first, second = [9.0, 0, 0, 0], [0, 0, 9.0, 0]
    rows = drawing([[3], [3]], do_sample=False, eos_token_id=[1, 2])
    assert draw(rows, [first, second]) == ([0, 2], [False, False], [False, True])
    assert draw(rows, [first, first]) == ([0, 9], [False, True], [False, True])
    assert draw(rows, [second, first]) == ([2, 9], [False, True], [True, True])


def test_an_eos_in_the_prompt_ends_nothing():
    rows = drawing([[1], [2, 1]], do_sample=False, eos_token_id=1)
    assert draw(rows, [[5.0, 0, 0], [5.0, 0, 0]])[2] == [False, False]


def test_a_stop_sequence_ends_a_row_at_its_last_token_and_counts_in_the_response_alone():
    # "a" is 4, "b" is 5; the prompt of the second row ends with the first half of "ab"
    stop = Stopper(char_tokenizer(), ["ab"])
    rows = drawing([[6], [4]], do_sample=False, stop=stop)
    a, b = torch.eye(8)[4].tolist(), torch.eye(8)[5].tolist()
    assert draw(rows, [a, b])[2] == [False, False]
    assert draw(rows, [b, a]) == ([5, 4], [False, False], [True, False])
    assert draw(rows, [b, b]) == ([9, 5], [True, False], [True, True])


def test_what_was_said_is_penalised_in_each_row_by_itself():
    # a positive logit is divided by the penalty, a negative one multiplied; rows are of different lengths
    penalty = {"do_sample": False, "extra": {"repetition_penalty": 2.0}}
    assert draw(drawing([[0, 0, 0], [3]], **penalty), [[2.0, 1.5, -1, -1]] * 2)[0] == [1, 0]
    assert draw(drawing([[0], [2, 2]], **penalty), [[-1.0, -3, -1.5, -4]] * 2)[0] == [2, 0]


def test_padding_of_a_row_that_is_done_does_not_touch_the_others():
    rows = drawing([[3], [3]], do_sample=False, eos_token_id=1, pad_token_id=0, extra={"repetition_penalty": 2.0})
    assert draw(rows, [[0.0, 9, 0, 0], [0.0, 0, 9, 0]])[2] == [True, False]
    assert draw(rows, [[0.0, 9, 0, 0], [1.0, 0, 1.5, 0]])[0] == [0, 0]


def test_no_pair_of_tokens_comes_twice():
    rows = drawing([[1, 2, 1], [2, 1]], do_sample=False, extra={"no_repeat_ngram_size": 2})
    assert draw(rows, [[0.0, 1, 5, 2]] * 2)[0] == [3, 2]


def test_eos_waits_for_the_least_number_of_tokens():
    rows = drawing([[3], [3, 3, 3]], do_sample=False, min_new_tokens=2, eos_token_id=[1, 2])
    logits = [[0.5, 9.0, 8.0, 0]] * 2
    assert [draw(rows, logits)[0] for _ in range(3)] == [[0, 0], [0, 0], [1, 1]]


def test_a_mask_forbids_what_may_not_follow_the_last_token():
    mask = [[False, False, False], [False, True, False], [True, False, True]]
    rows = drawing([[0, 1], [1, 2], [2, 0]], do_sample=False, extra={"logit_mask": mask})
    assert draw(rows, [[1.0, 3.0, 2.0]] * 3)[0] == [2, 1, 1]
    assert draw(rows, [[1.0, 3.0, 2.0]] * 3)[0] == [1, 2, 2]


class _Q(nn.Module):
    """The lowest target Q of three tokens, in every state the same."""

    def __init__(self, q):
        super().__init__()
        self.q = torch.tensor(q)

    def lowest_target(self, hidden):
        return self.q.expand(len(hidden), 3)


class _Value(nn.Module):
    def forward(self, hidden):
        return torch.full((len(hidden),), 0.25)


HEADS = nn.ModuleDict({"q": _Q([0.0, 0.5, 1.0]), "value": _Value()})


@pytest.mark.parametrize(("beta", "token"), [(None, 0), (0, 0), (2, 1), (8, 2)])
def test_beta_moves_tokens_by_their_q(beta, token):
    # logits 2, 1.5, -1 and Q 0, .5, 1: with beta 2 they are 2, 2.5, 1, with beta 8 2, 5.5, 7
    extra = {} if beta is None else {"beta": beta}
    assert draw(drawing([[0]], heads=HEADS, do_sample=False, extra=extra), [[2.0, 1.5, -1.0]])[0] == [token]


def test_top_k_and_temperature_come_after_beta():
    # beta 4 and temperature 2 make 2, 1.5, -1 to 1, 1.75, 1.5, of which top 2 leaves the last two: .56 and .44
    settings = {"top_k": 2, "temperature": 2.0, "extra": {"beta": 4}}
    rows = drawing([[0]] * 4, [[0.0], [0.55], [0.57], [0.99]], HEADS, max_new_tokens=1, **settings)
    assert draw(rows, [[2.0, 1.5, -1.0]] * 4)[0] == [1, 1, 2, 2]


@pytest.mark.parametrize("do_sample", [True, False])
def test_nothing_is_drawn_from_logits_that_are_not_finite(do_sample):
    for broken in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="log-probabilities are not finite"):
            draw(drawing([[0], [0]], do_sample=do_sample), [[0.0, 1.0], [broken, 0.0]])


def test_a_forbidden_token_stays_forbidden_under_beta():
    mask = [[False, False, True]] * 3
    rows = drawing([[0]], heads=HEADS, do_sample=False, extra={"beta": 100, "logit_mask": mask})
    assert draw(rows, [[2.0, 1.5, -1.0]])[0] == [1]


def sampler(has_q):
    prepare_engine()  # imports Megatron-Core without its warnings
    from trlx.backends.megatron.generation import PipelineSampler

    return PipelineSampler([], SimpleNamespace(device=torch.device("cpu")), has_q, 3)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"num_beams": 4}, "gen_kwargs.num_beams does not work with a NeMo trainer, which knows beta, logit_mask"),
        ({"beta": 1}, "gen_kwargs.beta is 1, but only ILQL has the Q heads"),
        ({"beta": 0}, "gen_kwargs.beta is 0, but only ILQL has the Q heads"),
        ({"logit_mask": [[False]]}, r"logit_mask has the shape \[1, 1\], but the model has 3 tokens: make it \[3, 3\]"),
    ],
)
def test_settings_that_do_not_work_are_told(extra, words):
    with pytest.raises(ValueError, match=words):
        sampler(has_q=False).check(SamplingConfig(extra=extra))


def test_settings_that_work_are_taken():
    mask = torch.zeros(3, 3, dtype=torch.bool)
    extra = {"beta": 1, "logit_mask": mask, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    extra |= {"bad_words_ids": [[1]], "suppress_tokens": [2]}
    extra |= {"min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1}
    sampler(has_q=True).check(SamplingConfig(extra=extra))
    assert tokens(QUARTERS, [0.01, 0.99], extra={"min_p": 0.6}) == [1, 1]
