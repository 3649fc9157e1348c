"""Ready reward functions, on cases worked by hand."""

import math
import re
import sys
from decimal import Decimal
from fractions import Fraction

import pytest

import trlx
from tests.builders import char_tokenizer
from trlx.batch import Rollout
from trlx.rewards import (
    ExactMatch,
    LengthPenalty,
    MathMatch,
    NumberMatch,
    RegexMatch,
    RepetitionPenalty,
    last_number,
)
from trlx.rewards.scoring import Scorer

FAKE = """
import time

def parse(text):
    return [] if "?" in text else text.strip("$")

def verify(right, found):
    if found == "hangs":
        time.sleep(60)
    if found == "dies":
        raise MemoryError
    return right == found
"""
"""A module with the functions of math-verify."""


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 12, no: 7.", "7"),
        ("1,234 apples", "1234"),
        ("in all 1,234,567.50 $", "1234567.5"),
        ("the numbers 1,2,3", "3"),
        ("1,2345", "2345"),
        ("x = -3.5", "-3.5"),
        ("x = −3", "-3"),
        ("5-3", "3"),
        ("f(2)-3", "3"),
        ("a range, 5 - 3", "3"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("6e3", "6000"),
        ("1.5e-2 m", "0.015"),
        ("1e99999", "99999"),
        (r"\boxed{41} or \boxed{42}, in 3 steps", "42"),
        (r"\boxed{10{,}000 \text{ km}}. 5", "10000"),
        (r"\boxed{10,\!000}", "10000"),
        ("6 * 7 = 42\n#### 42\n3 ways", "42"),
        ("#### -1,000", "-1000"),
        ("12345678901234567890123", "12345678901234567890123"),
    ],
)
def test_the_last_number_of_a_text_is_found(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "- . ,", r"7 steps: \boxed{x}", "7 steps\n#### ?"])
def test_a_text_without_a_number_where_the_answer_stands_has_none(text):
    assert last_number(text) is None


def test_numbers_match_as_numbers_and_long_ones_in_every_digit():
    outputs = ["so 1,200", "1200.0", "1201", "no idea", "10000000000000000000001"]
    answers = ["1200", 1200, 1200.0, "#### 1200", "10000000000000000000002"]
    assert NumberMatch("answer")(outputs=outputs, answer=answers) == [1, 1, 0, 0, 0]
    assert NumberMatch("right", tolerance=0.5)(outputs=["3.5", "2.4"], right=[3, 3], other=[0, 0]) == [1, 0]


def test_an_answer_without_a_number_is_refused_with_its_name():
    with pytest.raises(ValueError, match="^the prompts' 'right' must be a number or a text with one, got 'x'$"):
        NumberMatch("right")(outputs=["1"], right=["x"])


@pytest.mark.parametrize(
    "answer", ["1/2", "x = 3 / 4.", "1.5/2", Fraction(1, 2), r"#### \frac{1}{2}", r"\boxed{\dfrac12}"]
)
def test_an_answer_that_is_a_fraction_is_refused_as_only_a_part_of_it_would_count(answer):
    with pytest.raises(ValueError, match="'answer' must be a decimal number, got .*: for fractions take MathMatch"):
        NumberMatch()(outputs=["0.5"], answer=[answer])


def test_an_answer_with_a_fraction_before_its_last_number_is_compared():
    answers = ["6/2 = 3", "1/2 of 6\n#### 3", r"\frac{6}{2} = 3", "1/12/3", "3 km/h"]
    assert NumberMatch()(outputs=["3"] * 5, answer=answers) == [1] * 5
    assert NumberMatch()(outputs=["50", "0.5"], answer=["50%", "50%"]) == [1, 0]


@pytest.mark.parametrize("answer", [None, ["4", "5"], {"value": 4}])
@pytest.mark.parametrize("kind", [ExactMatch, NumberMatch, MathMatch])
def test_an_answer_that_nothing_can_equal_is_refused(kind, answer, fake):
    with pytest.raises(ValueError, match="^the prompts' 'right' must be a .*, got "):
        kind("right")(outputs=["4"], right=[answer])


def test_texts_match_without_the_spaces_around_them():
    outputs, answers = [" Paris\n", "paris", "Paris!", "42"], ["Paris", "Paris", "Paris", 42]
    assert ExactMatch()(outputs=outputs, answer=answers) == [1, 0, 0, 1]
    assert ExactMatch(ignore_case=True)(outputs=outputs, answer=answers) == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("pattern", "scores"),
    [
        (r"<answer>(.*?)</answer>", [1, 0, 0]),  # the last match, over lines
        (r"\w+(?=<)", [1, 0, 0]),  # without a group
        (re.compile(r"<answer>(b)?"), [0, 0, 1]),  # a group that takes no part is no answer
    ],
)
def test_what_a_pattern_finds_last_is_compared(pattern, scores):
    outputs = ["<answer>b</answer> <answer>\na</answer>", "a", "<answer>a <answer>b"]
    assert ExactMatch(pattern=pattern)(outputs=outputs, answer=["a", "a", "b"]) == scores


def test_a_format_is_rewarded_wherever_it_stands_and_over_lines():
    outputs = ["<think>a\nb</think> c", "x <think></think>", "<think>a"]
    assert RegexMatch("<think>.*</think>")(outputs=outputs) == [1, 1, 0]
    assert RegexMatch(re.compile("^<think>.*</think>"))(outputs=outputs) == [0, 0, 0]


def test_length_costs_nothing_up_to_the_start_and_one_at_the_end():
    ids = [[7] * length for length in (0, 4, 5, 8, 9)]
    assert LengthPenalty(4, 8)(output_ids=ids) == [0, 0, -0.25, -1, -1]
    assert math.copysign(1, LengthPenalty(4, 8)(output_ids=[[7]])[0]) == 1  # not -0.0


def test_repetition_costs_the_share_of_ngrams_that_were_there_before():
    # 12 23 31 12 23: two of five occurred before
    assert RepetitionPenalty(2)(output_ids=[[1, 2, 3, 1, 2, 3], [1, 2, 3], [1], []]) == pytest.approx([-0.4, 0, 0, 0])
    assert RepetitionPenalty()(output_ids=[[5, 5, 5, 5, 5]]) == pytest.approx([-2 / 3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthPenalty(8, 8), "0 <= start < end"),
        (lambda: RepetitionPenalty(0), "1 token or more"),
        (lambda: ExactMatch("final answer"), "'final answer': rename this key"),
        (lambda: NumberMatch("class"), "'class': rename this key"),
    ],
)
def test_what_a_function_cannot_use_is_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_they_are_parts_of_a_reward_and_get_what_they_ask_for():
    tokenizer = char_tokenizer(characters="0123456789 ")
    chat = [{"role": "user", "content": "2 + 2"}]
    ids = tokenizer(["1", "4", " 4"], add_special_tokens=False)["input_ids"]
    rollouts = [Rollout(ids[0], one, messages=chat, metadata={"answer": "4"}) for one in ids]
    reward = trlx.WeightedRewards({"right": (NumberMatch(), 1.0), "long": (LengthPenalty(1, 3), 0.5)})
    scored = Scorer(reward, tokenizer).score(rollouts)
    assert [(each.score, *each.parts.values()) for each in scored] == [(0, 0, 0), (1, 1, 0), (0.75, 1, -0.5)]
    (first, _) = Scorer([NumberMatch(), ExactMatch()], tokenizer).score(rollouts[:2])
    assert first.parts == {"NumberMatch": 0, "ExactMatch": 0}


def test_prompts_without_the_column_are_refused_before_anything_is_sampled():
    scorer = Scorer({"right": NumberMatch("answer")}, char_tokenizer())
    scorer.check(["answer"])
    with pytest.raises(ValueError, match="'right' asks for 'answer', which nothing provides.*Did you mean 'answers'"):
        scorer.check(["answers"])


def test_formulas_need_a_package_that_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'MathMatch needs math_verify, .*pip install "trlx\[math\]"'):
        MathMatch()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "math_verify.py"


def test_a_formula_that_takes_too_long_or_too_much_scores_0_and_the_next_is_compared(fake, capfd):
    reward = MathMatch(timeout=0.3)
    outputs = ["a", "hangs", "a", "dies", "a\n", "b"]
    assert reward(outputs=outputs, answer=["a", "a", "$a$", "a", "a\n", "a"]) == [1, 0, 1, 0, 1, 0]
    assert "MemoryError" in capfd.readouterr().err
    with pytest.raises(ValueError, match="'answer' must be a number or a formula, got '\\?'"):
        reward(outputs=["a"], answer=["?"])


def test_a_package_that_cannot_be_imported_ends_the_run(fake, capfd):
    fake.write_text("raise OSError('no such library')")
    with pytest.raises(RuntimeError, match="could not import math_verify"):
        MathMatch()(outputs=["a"], answer=["a"])
    assert "no such library" in capfd.readouterr().err


def test_formulas_are_equal_whatever_they_look_like():
    pytest.importorskip("math_verify", reason="pip install 'trlx[math]'")
    cases = [
        ("1/2", r"so \boxed{0.5}", 1),
        (r"\frac{1}{2}", r"\boxed{\frac12}", 1),
        (r"$2\sqrt{3}$", r"$\sqrt{12}$", 1),
        ("x+1", "$1+x$", 1),
        ("x+1", "$x+2$", 0),
        (42, "The answer is 42.", 1),
        ("42", "I do not know", 0),
        ("42", r"\boxed{9^{9^{9^9}}}", 0),
    ]
    answers, outputs, scores = zip(*cases, strict=True)
    assert MathMatch(timeout=1.0)(outputs=list(outputs), answer=list(answers)) == list(scores)
