import pytest

from tests.builders import char_tokenizer
from trlx.data.tokenizer import load_tokenizer, shorten, start_token_id


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


def test_a_text_without_prompt_starts_with_bos_or_else_with_eos():
    assert start_token_id(char_tokenizer()) == 1
    assert start_token_id(char_tokenizer(bos=False)) == 2


@pytest.mark.parametrize(
    ("length", "right", "left"),
    [(2, [1, 2], [2, 3]), (3, [1, 2, 3], [1, 2, 3]), (4, [1, 2, 3], [1, 2, 3]), (0, [], [])],
)
def test_what_is_too_long_is_cut_on_the_side_named(length, right, left):
    assert shorten([1, 2, 3], length, "right") == right
    assert shorten([1, 2, 3], length, "left") == left
