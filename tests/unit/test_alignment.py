"""Dense scores that count the tokens of the retokenized output, as recipes for the original did."""

import pytest
import torch

import trlx
from examples.common import byte_tokenizer
from tests.builders import char_tokenizer
from tests.runs import PROMPTS, tiny_config
from tests.unit.test_seq2seq import tokenizer_that_ends_texts
from trlx.batch import Rollout
from trlx.rewards.calling import RewardError
from trlx.rewards.scoring import Scorer

EOS = 2


def tokenizer_that_knows_pairs():
    """The character tokenizer with a token for "ab", id 38."""
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["ab"])
    return tokenizer


def placed(tokenizer, responses, *numbers):
    """The scores of responses for which reward_fn, which knows the texts alone, returns these lists."""
    rollouts = [Rollout([4], response) for response in responses]
    return [scored.score for scored in Scorer(lambda outputs: list(numbers), tokenizer).score(rollouts)]


def test_the_number_of_a_bos_goes_to_the_first_token_also_where_eos_makes_up_for_the_length():
    tokenizer = char_tokenizer(adds_bos=True)
    assert tokenizer("ab")["input_ids"] == [1, 4, 5]
    assert placed(tokenizer, [[4, 5, 6], [4, 5, EOS]], [9, 1, 2, 3], [9, 1, 2]) == [[10.0, 2.0, 3.0], [10.0, 2.0, 0.0]]
    # without special tokens each number is where it belongs
    assert placed(tokenizer, [[4, 5, 6], [4, 5, EOS]], [1, 2, 3], [1, 2]) == [[1.0, 2.0, 3.0], [1.0, 2.0, 0.0]]


def test_the_number_of_an_eos_that_the_tokenizer_adds_goes_to_the_last_token():
    tokenizer = tokenizer_that_ends_texts("<s> $A </s>")
    numbers = [9, 1, 2, 7], [9, 1, 7]
    assert placed(tokenizer, [[4, 5], [4, EOS]], *numbers) == [[10.0, 2.0 + 7], [10.0, 7.0]]


def test_half_a_character_is_one_token_but_three_in_the_text():
    tokenizer = byte_tokenizer()
    response = [tokenizer.convert_tokens_to_ids("x"), *tokenizer("é", add_special_tokens=False)["input_ids"][:1]]
    response.append(tokenizer.convert_tokens_to_ids("y"))
    text = tokenizer.decode(response)
    assert text == "x\N{REPLACEMENT CHARACTER}y" and len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 5
    assert placed(tokenizer, [response], [1, 2, 3, 4, 5]) == [[1.0, 2.0 + 3 + 4, 5.0]]


def test_numbers_stand_where_the_text_of_their_token_is_complete():
    tokenizer = tokenizer_that_knows_pairs()
    assert placed(tokenizer, [[6, 4, 5, 6], [38, EOS]], [1, 2, 3], [4]) == [[1.0, 0.0, 2.0, 3.0], [4.0, 0.0]]
    # sampled as four tokens, read as three
    other = char_tokenizer()
    other.add_tokens(["bc"])
    assert placed(other, [[4, 5, 6, 6]], [1, 2, 3]) == [[1.0, 0.0, 2.0, 3.0]]


def test_lists_that_all_leave_out_bos_count_the_tokens_of_the_text_however_short_they_are():
    tokenizer = char_tokenizer(adds_bos=True)
    tokenizer.add_tokens(["ab"])  # read as two tokens behind bos, sampled as three
    assert tokenizer("abc")["input_ids"] == [1, 38, 6]
    assert placed(tokenizer, [[4, 5, 6]], [1, 2]) == [[0.0, 1.0, 2.0]]


def test_lists_of_other_lengths_stay_as_they_are():
    tokenizer = char_tokenizer(adds_bos=True)
    # the first is as long as bos and text, and as the response: only where all count so is it a reading of the text
    assert placed(tokenizer, [[4, 5, EOS], [4, 5, 6]], [1, 2, 3], [1, 2]) == [[1.0, 2.0, 3.0], [1.0, 2.0, 0.0]]
    assert placed(tokenizer, [[4, 5, 6], [4, 5, 6]], [1, 2], [1, 2, 3]) == [[1.0, 2.0, 0.0], [1.0, 2.0, 3.0]]
    pairs = tokenizer_that_knows_pairs()  # "abc" is two tokens of its, but "cdc" is three
    assert placed(pairs, [[4, 5, 6], [6, 7, 6]], [1, 2], [3, 4]) == [[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]
    # one that is too long is aligned all the same
    assert placed(tokenizer, [[4, 5, 6], [4, 5, 6]], [1, 2], [9, 1, 2, 3]) == [[1.0, 2.0, 0.0], [10.0, 2.0, 3.0]]
    assert placed(tokenizer, [[4, 5], [4, 5]], 3, [9, 1, 2]) == [3.0, [10.0, 2.0]]


def test_what_is_longer_than_the_text_in_any_reading_is_refused():
    with pytest.raises(RewardError, match=r"5 numbers, but the response has 3 tokens \(see output_ids\), for sample 0"):
        placed(char_tokenizer(adds_bos=True), [[4, 5, 6]], [1, 2, 3, 4, 5])


def test_a_function_that_takes_output_ids_is_taken_at_its_word():
    tokenizer = char_tokenizer(adds_bos=True)
    rollouts = [Rollout([4], [4, 5, EOS])]
    exact = Scorer(lambda output_ids: [[1, 2, 3]], tokenizer).score(rollouts)
    assert [scored.score for scored in exact] == [[1.0, 2.0, 3.0]]
    with pytest.raises(RewardError, match="4 numbers"):
        Scorer(lambda output_ids: [[1, 2, 3, 4]], tokenizer).score([Rollout([4], [4, 5, 6])])


def test_one_warning_names_output_ids(caplog):
    tokenizer = char_tokenizer(adds_bos=True)
    scorer = Scorer(lambda outputs: [[1.0] * (len(output) + 1) for output in outputs], tokenizer)
    for _ in range(2):
        scorer.score([Rollout([4], [4, 5, 6]), Rollout([4], [4, 5])])
    assert sum("output_ids" in record.message for record in caplog.records) == 1
    placed(char_tokenizer(), [[4, 5, 6]], [1, 2, 3])
    assert sum("output_ids" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("eos_in_outputs", [False, True])
def test_the_recipe_of_old_scripts_trains_with_a_tokenizer_that_adds_bos(tmp_path, eos_in_outputs):
    def reward(samples, prompts, outputs, tokenizer, **kwargs):
        return [[0.0] + [1.0] * (len(tokenizer(output).input_ids) - 1) for output in outputs]

    # no token without a text, but eos
    method = {"scale_reward": None, "gen_kwargs": {"suppress_tokens": [0, 1, 3]}}
    tokenizer = {"tokenizer_path": char_tokenizer(adds_bos=True)}
    train = {"total_steps": 1, "eos_in_outputs": eos_in_outputs}
    config = tiny_config(tmp_path, "PPO", method=method, tokenizer=tokenizer, train=train)
    batch = trlx.train(config=config, reward_fn=reward, prompts=PROMPTS).store
    expected = batch.response_mask & ((batch.tokens != EOS) | eos_in_outputs)
    assert torch.equal(batch.scores, expected.float())
