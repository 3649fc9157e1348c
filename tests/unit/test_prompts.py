import copy

import pytest

from tests.builders import char_tokenizer
from trlx.data.prompts import Prompt, PromptPipeline, PromptStream
from trlx.data.store import pass_order
from trlx.registry import pipelines


def test_the_pipeline_is_registered_under_its_name():
    assert pipelines.get("promptpipeline") is PromptPipeline


def test_a_text_is_tokenized_with_what_the_tokenizer_puts_in_front_and_without_what_it_appends(tokenizer):
    pipeline = PromptPipeline(["ab", "c"], 8, tokenizer)
    assert len(pipeline) == 2
    assert pipeline[0] == Prompt(ids=[4, 5], text="ab", metadata={})
    llama = char_tokenizer(adds_bos=True, adds_eos=True)
    assert [prompt.ids for prompt in PromptPipeline(["ab", "<s>c", ""], 8, llama)] == [[1, 4, 5], [1, 6], [1]]
    assert PromptPipeline(["ab"], 8, llama, add_special_tokens=True)[0].ids == [1, 4, 5, 2]


def test_token_ids_are_taken_as_they_are(tokenizer):
    pipeline = PromptPipeline([[7, 8], "a", [9]], 8, tokenizer)
    assert [(prompt.ids, prompt.text) for prompt in pipeline] == [([7, 8], None), ([4], "a"), ([9], None)]


def test_further_keys_become_metadata_and_the_dicts_stay_as_they_were(tokenizer):
    mine = [{"prompt": "a", "label": 1}, {"label": 2, "prompt": "b"}]
    before = copy.deepcopy(mine)
    pipeline = PromptPipeline(mine, 8, tokenizer)
    assert [prompt.metadata for prompt in pipeline] == [{"label": 1}, {"label": 2}]
    assert mine == before


@pytest.mark.parametrize(("side", "kept"), [("right", [4, 5]), ("left", [6, 7])])
def test_long_prompts_are_cut_on_the_truncation_side_with_one_warning(tokenizer, caplog, side, kept):
    tokenizer.truncation_side = side
    pipeline = PromptPipeline(["abcd", [4, 5, 6, 7], "ab"], 2, tokenizer)
    assert [prompt.ids for prompt in pipeline] == [kept, kept, [4, 5]]
    (record,) = caplog.records
    for part in ("2 of 3", "2 tokens", "train.seq_length", "max_new_tokens", side):
        assert part in record.message


@pytest.mark.parametrize(("side", "kept"), [("right", [4, 5]), ("left", [6, 7])])
def test_a_cut_prompt_keeps_its_bos_and_what_an_encoder_wants_at_its_end(side, kept):
    tokenizer = char_tokenizer(adds_bos=True, adds_eos=True)
    tokenizer.truncation_side = side
    assert PromptPipeline(["abcd"], 4, tokenizer, add_special_tokens=True)[0].ids == [1, *kept, 2]
    prompts = ["abcd", "<s>abcd", [1, 4, 5, 6, 7]]
    for each in (tokenizer, char_tokenizer()):
        each.truncation_side = side
        cut = [prompt.ids for prompt in PromptPipeline(prompts[each is not tokenizer :], 3, each)]
        assert cut == [[1, *kept]] * (3 if each is tokenizer else 2)


def test_prompts_that_fit_are_not_talked_about(tokenizer, caplog):
    PromptPipeline(["ab"], 2, tokenizer)
    assert not caplog.records


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "at least one prompt"),
        ("ab", TypeError, "list of prompts"),
        (["a", ""], ValueError, "Prompt 1 has no tokens.*'<s>'"),
        (["a", []], ValueError, "Prompt 1 has no tokens"),
        (["a", 3], TypeError, "Prompt 1 must be a text"),
        (["a", ["b"]], TypeError, "Prompt 1 must be a text"),
        ([{"prompt": "a"}, {"text": "b"}], ValueError, 'Prompt 1 .*"prompt"'),
        ([{"prompt": "a", "x": 1}, {"prompt": "b", "y": 1}], ValueError, "Prompt 1 has the keys .*'y'.*'x'"),
        ([{"prompt": "a"}, {"prompt": "a", "x": 1}], ValueError, "Prompt 1 has the keys"),
        ([{"prompt": "a", "outputs": 1}], ValueError, "'outputs'.*rename"),
    ],
)
def test_a_wrong_prompt_is_named(tokenizer, prompts, error, message):
    with pytest.raises(error, match=message):
        PromptPipeline(prompts, 8, tokenizer)


def test_no_room_for_prompts_is_an_error_that_says_which_settings_to_change(tokenizer):
    with pytest.raises(ValueError, match="train.seq_length larger than max_new_tokens"):
        PromptPipeline(["a"], 0, tokenizer)


def test_the_digest_tells_other_tokens_and_other_metadata_apart(tokenizer):
    def digest(*prompts):
        return PromptPipeline(prompts, 8, tokenizer).digest()

    assert digest("a", "b") == digest("a", "b")
    others = [
        digest("b", "a"),
        digest("ab"),
        digest({"prompt": "a", "x": 1}),
        digest({"prompt": "a", "x": 2}),
        digest("a"),
    ]
    assert len({digest("a", "b"), *others}) == 6


def test_the_digest_does_not_depend_on_where_an_object_lies_in_memory(tokenizer):
    first, second = object(), object()
    digests = [PromptPipeline([{"prompt": "a", "x": thing}], 8, tokenizer).digest() for thing in (first, second)]
    assert digests[0] == digests[1]


def test_every_pass_of_a_stream_holds_every_prompt_once_in_a_new_order(tokenizer):
    stream = PromptStream(PromptPipeline(list("abcdefgh"), 8, tokenizer), seed=1)
    first, second = ([prompt.text for prompt in stream.take(8)] for _ in range(2))
    assert sorted(first) == sorted(second) == list("abcdefgh")
    assert first != second


def test_a_stream_set_to_a_position_goes_on_exactly_from_there(tokenizer):
    pipeline = PromptPipeline(list("abcde"), 8, tokenizer)
    whole = PromptStream(pipeline, seed=1).take(13)
    resumed = PromptStream(pipeline, seed=1)
    resumed.position = 4
    assert resumed.take(3) + resumed.take(6) == whole[4:]
    assert resumed.position == 13


def test_prompts_are_not_drawn_in_the_order_that_batches_are_read_in(tokenizer):
    letters = "abcdefghijklmnop"
    drawn = [prompt.text for prompt in PromptStream(PromptPipeline(list(letters), 8, tokenizer), seed=1).take(16)]
    assert drawn != [letters[row] for row in pass_order(16, seed=1, number=0)]


def test_another_seed_is_another_order(tokenizer):
    pipeline = PromptPipeline(list("abcdefgh"), 8, tokenizer)
    assert PromptStream(pipeline, seed=1).take(8) != PromptStream(pipeline, seed=2).take(8)
