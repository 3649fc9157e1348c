import pytest

from tests.builders import char_tokenizer
from trlx.batch import Rollout
from trlx.data.dialogue import dialogues

BOS, EOS, A, B, C, D = 1, 2, 4, 5, 6, 7


def one(sample, tokenizer, max_length=99):
    (rollout,) = dialogues([sample], tokenizer, max_length)
    return rollout


def test_a_text_is_a_response_to_bos_and_ends_with_eos(tokenizer):
    assert one("ab", tokenizer) == Rollout(prompt=[BOS], response=[A, B, EOS])


def test_eos_begins_a_text_where_there_is_no_bos():
    assert one("ab", char_tokenizer(bos=False)) == Rollout(prompt=[EOS], response=[A, B, EOS])


@pytest.mark.parametrize("text", ["ab</s>", "<s>ab", "<s>ab</s>"])
def test_special_tokens_the_text_brings_along_are_not_doubled(tokenizer, text):
    assert one(text, tokenizer) == Rollout(prompt=[BOS], response=[A, B, EOS])


def test_a_bos_that_the_tokenizer_adds_by_itself_appears_once():
    tokenizer = char_tokenizer(adds_bos=True)
    assert one("ab", tokenizer) == Rollout(prompt=[BOS], response=[A, B, EOS])
    assert one(["a", "b"], tokenizer) == Rollout(prompt=[BOS, A], response=[B, EOS])


@pytest.mark.parametrize("adds_eos", [False, True])
def test_a_dialogue_begins_as_the_tokenizer_begins_texts_and_goes_on_without_special_tokens(adds_eos):
    tokenizer = char_tokenizer(adds_bos=True, adds_eos=adds_eos)
    for first in ("a", "<s>a"):
        rollout = one([first, "b", "cc", "d"], tokenizer)
        assert rollout == Rollout([BOS, A], [B, C, C, D, EOS], trained=[True, False, False, True, True])
    for sample in (["", "ab"], ["", "<s>ab"], "ab", "<s>ab", ["", "", "", "ab"]):
        assert one(sample, tokenizer) == Rollout(prompt=[BOS], response=[A, B, EOS])
    assert one(["", "", "a", "b"], tokenizer) == Rollout(prompt=[BOS, A], response=[B, EOS])


def test_what_is_cut_on_the_left_keeps_its_bos():
    for tokenizer in (char_tokenizer(adds_bos=True), char_tokenizer()):
        tokenizer.truncation_side = "left"
        assert one(["<s>ab", "cd"], tokenizer, 5) == Rollout(prompt=[BOS, B], response=[C, D, EOS])
        assert one(["<s>ab", "cd"], tokenizer, 3) == Rollout(prompt=[BOS], response=[D, EOS])
        assert one("abcd", tokenizer, 3) == Rollout(prompt=[BOS], response=[D, EOS])


@pytest.mark.parametrize("pair", [["ab", "c"], ("ab", "c"), ["ab", "c</s>"]])
def test_a_pair_is_a_prompt_and_an_output_that_ends_with_eos(tokenizer, pair):
    assert one(pair, tokenizer) == Rollout(prompt=[A, B], response=[C, EOS])


def test_later_prompts_stand_in_the_response_untrained_and_only_the_last_output_gets_eos(tokenizer):
    rollout = one(["a", "b", "cc", "d"], tokenizer)
    assert rollout == Rollout(prompt=[A], response=[B, C, C, D, EOS], trained=[True, False, False, True, True])


def test_empty_messages_vanish(tokenizer):
    assert one(["a", "", "b", "c"], tokenizer) == Rollout(prompt=[A, B], response=[C, EOS])
    assert one(["a", ""], tokenizer) == Rollout(prompt=[A], response=[EOS])


def test_bos_becomes_the_prompt_of_a_dialogue_that_starts_with_an_output(tokenizer):
    assert one(["", "ab"], tokenizer) == Rollout(prompt=[BOS], response=[A, B, EOS])


def test_right_truncation_cuts_the_end_of_the_whole_dialogue(tokenizer):
    assert one(["ab", "cd"], tokenizer, 3) == Rollout(prompt=[A, B], response=[C])
    assert one("abc", tokenizer, 3) == Rollout(prompt=[BOS], response=[A, B])


def test_left_truncation_cuts_its_beginning_and_gives_one_token_up_for_bos(tokenizer):
    tokenizer.truncation_side = "left"
    assert one(["ab", "cd"], tokenizer, 4) == Rollout(prompt=[B], response=[C, D, EOS])
    assert one(["ab", "cd"], tokenizer, 3) == Rollout(prompt=[BOS], response=[D, EOS])
    assert one("abcd", tokenizer, 3) == Rollout(prompt=[BOS], response=[D, EOS])


def test_a_dialogue_never_exceeds_the_maximum_length(tokenizer):
    for side in ("left", "right"):
        tokenizer.truncation_side = side
        for length in range(2, 8):
            for rollout in dialogues([["ab", "cd", "a", "b"], "abcdabcd"], tokenizer, length)[-1:]:
                assert len(rollout.prompt) + len(rollout.response) == min(length, 10)


def test_dialogues_of_which_no_output_is_left_are_dropped_and_counted(tokenizer, caplog):
    rollouts = dialogues([["abc", "d"], ["a", "b"]], tokenizer, 3)
    assert rollouts == [Rollout(prompt=[A], response=[B, EOS])]
    (record,) = caplog.records
    assert "1 of 2 samples" in record.message


@pytest.mark.parametrize("side", ["left", "right"])
def test_samples_that_are_cut_are_counted_in_one_warning(tokenizer, caplog, side):
    tokenizer.truncation_side = side
    # with bos and eos 6, 5, 4 and 6 tokens
    dialogues(["abcd", "abc", ["a", "bc"], ["ab", "abc"]], tokenizer, 6)
    assert not caplog.records
    dialogues(["abcd", "abc", ["a", "bc"], ["ab", "abc"]], tokenizer, 5)
    (record,) = caplog.records
    assert record.message == f"2 of 4 samples are longer than train.seq_length (5) and were cut on the {side}"


def test_scores_stay_with_their_samples_when_others_are_dropped(tokenizer):
    rollouts = dialogues([["abc", "d"], ["a", "b"]], tokenizer, 3, scores=[1.0, 2.0])
    assert [rollout.score for rollout in rollouts] == [2.0]


def test_nothing_left_to_learn_from_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="train.seq_length"):
        dialogues([["abc", "d"]], tokenizer, 3)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([], ValueError, "list of samples is empty: pass at least one"),
        ("ab", TypeError, "samples must be a list of samples, not one str"),
        (["a", 3], TypeError, "Sample 1"),
        (["a", ["b", 3]], TypeError, "Sample 1"),
        (["a", ["b", "c", "d"]], ValueError, "Sample 1 has 3 texts"),
        (["a", []], ValueError, "Sample 1 has 0 texts"),
    ],
)
def test_a_wrong_sample_is_named(tokenizer, samples, error, message):
    with pytest.raises(error, match=message):
        dialogues(samples, tokenizer, 8)
