import pytest
import torch

from trlx.sampling.drawing import Drawing
from trlx.sampling.settings import SamplingConfig
from trlx.sampling.stopping import Stopper

EOS = 2


class ByteTokenizer:
    """One token per byte of UTF-8, so that a character may be split between tokens."""

    def decode(self, ids, **kwargs):
        return bytes(ids).decode(errors="replace")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def cut_text(tokenizer, stops, text):
    kept, was_cut = Stopper(tokenizer, stops).cut(ids_of(tokenizer, text))
    return tokenizer.decode(kept), was_cut


def test_a_response_is_cut_before_the_first_of_all_stop_sequences(tokenizer):
    assert cut_text(tokenizer, ["##", "c"], "ab##c##") == ("ab", True)
    assert cut_text(tokenizer, ["c", "##"], "ab##c##") == ("ab", True)


def test_a_stop_sequence_that_begins_in_the_prompt_ends_nothing(tokenizer):
    sampling = SamplingConfig(2, do_sample=False, stop=Stopper(tokenizer, ["ab"]))
    drawing = Drawing(sampling, [ids_of(tokenizer, "a"), ids_of(tokenizer, "c")], torch.zeros(2, 2))
    for text, done in (("ba", [False, False]), ("ab", [False, True])):
        logits = torch.nn.functional.one_hot(torch.tensor(ids_of(tokenizer, text)), 40).float()
        assert drawing.draw(logits, logits)[2].tolist() == done


def test_a_response_without_stop_sequence_is_left_as_it_is(tokenizer):
    assert cut_text(tokenizer, ["##"], "ab#c ") == ("ab#c ", False)


def test_white_space_before_the_stop_sequence_goes_too(tokenizer):
    assert cut_text(tokenizer, ["#"], "a b \n#c") == ("a b", True)
    assert cut_text(tokenizer, ["#"], " \n#") == ("", True)


def test_a_token_that_holds_the_beginning_of_the_stop_sequence_goes_as_a_whole(tokenizer):
    tokenizer.add_tokens(["b#"])
    assert len(ids_of(tokenizer, "ab#c")) == 3
    assert cut_text(tokenizer, ["#"], "ab#c") == ("a", True)
    assert cut_text(tokenizer, ["#c"], "ab#c") == ("a", True)


def test_a_stop_sequence_may_be_the_text_of_a_special_token(tokenizer):
    assert cut_text(tokenizer, ["<s>"], "ab<s>c") == ("ab", True)


def test_characters_split_between_tokens_are_kept_whole():
    stopper = Stopper(ByteTokenizer(), ["é!"])
    assert stopper.cut(list("aéé!b".encode())) == (list("aé".encode()), True)


def test_eos_takes_the_place_of_a_stop_sequence_and_stands_once(tokenizer):
    stopper = Stopper(tokenizer, ["#"])
    assert stopper.finish([4, 5, *ids_of(tokenizer, "#"), EOS]) == ([4, 5, EOS], True)
    assert stopper.finish([4, EOS, *ids_of(tokenizer, "#")]) == ([4, EOS], True)
    assert stopper.finish(ids_of(tokenizer, "#")) == ([EOS], True)


def test_a_response_that_did_not_stop_gets_no_eos(tokenizer):
    stopper = Stopper(tokenizer, ["#"])
    assert stopper.finish([4, 5]) == ([4, 5], False)
    assert stopper.finish([4, EOS]) == ([4, EOS], False)


def test_generation_is_done_with_the_token_that_completes_a_stop_sequence(tokenizer):
    stopper, ids = Stopper(tokenizer, ["##", ":abc"]), ids_of(tokenizer, "a#b:ab:abc")
    assert [stopper.done(ids[: i + 1]) for i in range(len(ids))] == [False] * 9 + [True]
    assert stopper.done(ids_of(tokenizer, "ab##"))


def test_a_stop_sequence_of_many_bytes_is_seen_whole():
    stopper = Stopper(ByteTokenizer(), ["éééé"])
    ids = list("aaéaaaaéééé".encode())
    assert [stopper.done(ids[:end]) for end in (len(ids) - 1, len(ids))] == [False, True]


def test_only_the_end_of_a_response_is_decoded():
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, ids, **kwargs):
            self.longest = max(self.longest, len(ids))
            return super().decode(ids, **kwargs)

    tokenizer = Counting()
    Stopper(tokenizer, ["##"]).done([97] * 1000)
    assert tokenizer.longest < 10


def test_transformers_is_told_row_by_row_and_the_prompt_does_not_count(tokenizer):
    rows = torch.tensor([ids_of(tokenizer, text) for text in ("##ab", "abb#", "bb##")])
    done = Stopper(tokenizer, ["##"]).criteria(prompt_width=2)(rows, None)
    assert done.tolist() == [False, False, True]
    assert done.dtype == torch.bool
    assert Stopper(tokenizer, ["b#"]).criteria(prompt_width=3)(rows, None).tolist() == [False, False, False]


def test_a_model_stops_generating_at_a_stop_sequence(tokenizer, model):
    model.lm_head.weight.data.zero_()  # every token is equally likely, so the first id of all is taken
    criteria = Stopper(tokenizer, ["<pad><pad>"]).criteria(prompt_width=1)
    out = model.generate(torch.tensor([[4]]), max_new_tokens=10, do_sample=False, stopping_criteria=[criteria])
    assert out.tolist() == [[4, 0, 0]]


@pytest.mark.parametrize("stops", ["#", ["#", ""], [3]])
def test_stop_sequences_are_a_list_of_texts(tokenizer, stops):
    with pytest.raises(ValueError, match="list of non-empty texts"):
        Stopper(tokenizer, stops)


@pytest.mark.parametrize("stops", [["ab"], ["b ", "z"], ["é"], ["c", "\n"]])
def test_only_tokens_that_can_end_a_stop_sequence_are_looked_at(tokenizer, stops, monkeypatch):
    stopper, plain = Stopper(tokenizer, stops), Stopper(tokenizer, stops)
    monkeypatch.setattr(plain, "_can_end", lambda token: True)
    ids = torch.randint(4, 30, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    start = 0
    for end in range(1, 401):
        is_done = plain.done(ids[:end], start)
        assert stopper.done(ids[:end], start) == is_done
        start = end if is_done else start
    assert start or stops == ["é"]
    assert (sum(map(stopper._can_end, ids)) < 100) == ("b " not in stops)
