import pytest

from tests.builders import char_tokenizer
from trlx.data.tokenizer import beginning, front, load_tokenizer, prompt_tokens, shorten


def test_eos_pads_where_there_is_no_pad_token_and_one_line_says_so(caplog):
    mine = char_tokenizer(pad=False)
    tokenizer = load_tokenizer(mine)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert mine.pad_token_id is None


def test_an_own_pad_token_is_kept():
    assert load_tokenizer(char_tokenizer()).pad_token_id == 0


def test_pad_may_equal_eos():
    assert load_tokenizer(char_tokenizer(pad_is_eos=True)).pad_token_id == 2


def test_a_tokenizer_without_eos_is_refused_with_what_to_write():
    with pytest.raises(ValueError, match="tokenizer.tokenizer_extra_configs.eos_token"):
        load_tokenizer(char_tokenizer(eos=False))


def test_a_folder_is_loaded_with_sides_and_further_arguments(tmp_path):
    char_tokenizer(eos=False).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(
        str(tmp_path), padding_side="right", truncation_side="left", extra={"eos_token": "</s>", "pad_token": "#"}
    )
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "left")
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (2, "#")
    assert tokenizer.decode(tokenizer("ab c")["input_ids"]) == "ab c"


def test_the_sides_default_to_left_padding_and_right_truncation():
    tokenizer = load_tokenizer(char_tokenizer())
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "right")


def test_arguments_for_loading_make_no_sense_for_a_tokenizer_object():
    with pytest.raises(ValueError, match="tokenizer_extra_configs"):
        load_tokenizer(char_tokenizer(), extra={"eos_token": "#"})


def test_a_text_without_prompt_starts_as_the_tokenizer_starts_texts_or_else_with_bos_or_else_with_eos():
    assert beginning(char_tokenizer(adds_bos=True)) == front(char_tokenizer(adds_bos=True, adds_eos=True)) == [1]
    assert beginning(char_tokenizer()) == beginning(char_tokenizer(adds_eos=True)) == [1]
    assert beginning(char_tokenizer(bos=False)) == [2]
    assert front(char_tokenizer()) == front(char_tokenizer(adds_eos=True)) == []


@pytest.mark.parametrize("adds_eos", [False, True])
def test_a_prompt_gets_what_the_tokenizer_puts_in_front_once_and_nothing_behind(adds_eos):
    texts = ["ab", "<s>ab", "", "<s>"]
    tokenizer = char_tokenizer(adds_bos=True, adds_eos=adds_eos)
    assert prompt_tokens(texts, tokenizer) == [[1, 4, 5], [1, 4, 5], [1], [1]]
    assert prompt_tokens(texts, char_tokenizer(adds_eos=adds_eos)) == [[4, 5], [1, 4, 5], [], [1]]
    assert prompt_tokens([], tokenizer) == []


def test_what_an_encoder_reads_is_all_that_the_tokenizer_makes_of_a_text():
    tokenizer = char_tokenizer(adds_bos=True, adds_eos=True)
    assert prompt_tokens(["ab"], tokenizer, special_tokens=True) == [[1, 4, 5, 2]]


@pytest.mark.parametrize(
    ("length", "right", "left"),
    [(2, [1, 2], [2, 3]), (3, [1, 2, 3], [1, 2, 3]), (4, [1, 2, 3], [1, 2, 3]), (0, [], [])],
)
def test_what_is_too_long_is_cut_on_the_side_named(length, right, left):
    assert shorten([1, 2, 3], length, "right") == right
    assert shorten([1, 2, 3], length, "left") == left


@pytest.mark.parametrize(("length", "left"), [(4, [1, 2, 3, 4]), (3, [1, 3, 4]), (2, [1, 4]), (1, [1]), (0, [])])
def test_what_is_to_be_kept_in_front_survives_a_cut_on_the_left(length, left):
    assert shorten([1, 2, 3, 4], length, "left", kept=1) == left
    assert shorten([1, 2, 3, 4], length, "right", kept=1) == [1, 2, 3, 4][:length]
