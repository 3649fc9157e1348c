"""Data sets of several makes as prompts and samples."""

import pytest

import trlx
from tests.runs import share_of_a, tiny_config
from trlx.data.rows import as_list, sample_list


class Columns:
    """As much of a `datasets.Dataset` as is relied on: rows are dicts, and a slice is a dict of lists."""

    def __init__(self, rows):
        self._rows = rows
        self.column_names = list(rows[0])

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return {name: [row[name] for row in self._rows[index]] for name in self.column_names}
        return self._rows[index]

    def __iter__(self):
        return iter(self._rows)


class Endless:
    """A torch data set: it never says that an index is too large."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return "ab"[index % 2]


def hugging_face(rows):
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def pandas(rows):
    return pytest.importorskip("pandas").DataFrame(rows)


MAKERS = pytest.mark.parametrize("make", [list, Columns, hugging_face, pandas])
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@MAKERS
def test_rows_are_dicts_whatever_holds_them(make):
    rows = [{"prompt": "a", "x": 1}, {"prompt": "b", "x": 2}]
    assert as_list(make(rows), "prompts") == rows


def test_other_sequences_are_read_to_their_length():
    assert as_list(Endless(), "prompts") == ["a", "b"]
    assert as_list(("a", "b"), "prompts") == as_list(iter("ab"), "prompts") == ["a", "b"]


@MAKERS
@pytest.mark.parametrize(
    ("row", "sample"),
    [
        ({"text": "a", "id": 7}, "a"),
        ({"prompt": "a", "completion": "b"}, ["a", "b"]),
        ({"output": "b", "prompt": "a", "id": 7}, ["a", "b"]),
        ({"prompt": "a", "response": "b"}, ["a", "b"]),
        ({"messages": MESSAGES, "prompt": "a"}, MESSAGES),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, MESSAGES),
    ],
)
def test_samples_are_what_their_columns_say(make, row, sample):
    assert sample_list(make([row, row])) == [sample, sample]


@pytest.mark.parametrize("samples", [["a", "b"], [["a", "b"]], [MESSAGES], []])
def test_samples_without_columns_stay_as_they_are(samples):
    assert sample_list(samples) == samples


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "label": 1}], 'columns prompt, label, and trlx knows no way to read them: keep "text"'),
        ([MESSAGES[0]], "columns role, content, and trlx knows no way"),
        ([{"text": "a", "messages": MESSAGES}], "2 ways to read them: keep"),
        ([{"text": "a"}, {"txt": "a"}], "Sample 1 must have text"),
        ([{"text": "a"}, {"text": None}], "Sample 1 must have text"),
        ([{"prompt": "a", "output": "b"}, "c"], "Sample 1 must have prompt and output"),
    ],
)
def test_columns_that_say_nothing_are_refused_by_name(rows, words):
    with pytest.raises(ValueError, match=words):
        sample_list(rows)


def test_one_text_or_several_data_sets_are_no_data_set():
    with pytest.raises(TypeError, match="prompts must be a list of prompts, not one str"):
        as_list("ab", "prompts")
    splits = pytest.importorskip("datasets").DatasetDict(train=hugging_face([{"text": "a"}]))
    with pytest.raises(TypeError, match="not one DatasetDict: pass one of its data sets"):
        sample_list(splits)


@pytest.mark.parametrize("make", [Columns, hugging_face])
def test_data_sets_train_end_to_end(tmp_path, make):
    prompts = make([{"prompt": text, "x": i} for i, text in enumerate("abcdefgh")])
    seen = []

    def reward(samples, prompts, outputs, x, **kwargs):
        assert ["abcdefgh"[i] for i in x] == prompts
        seen.extend(x)
        return share_of_a(samples, prompts, outputs)

    config = tiny_config(tmp_path / "ppo", "PPO", train={"total_steps": 1})
    trlx.train(config=config, reward_fn=reward, prompts=prompts)
    assert set(seen) == set(range(8)) and seen[:4] == [0, 1, 2, 3]  # the first batch of prompts is evaluated first
    samples = make([{"prompt": "ab", "completion": "cd", "reward": i} for i in range(4)])
    config = tiny_config(tmp_path / "sft", "SFT", train={"total_steps": 1})
    trainer = trlx.train(config=config, samples=samples, eval_prompts=prompts)
    assert trainer.store.rollouts[0].response == [6, 7, 2] and len(trainer.store) == 4
    config = tiny_config(tmp_path / "ilql", "ILQL", train={"total_steps": 1})
    rewards = [row["reward"] for row in samples]
    trainer = trlx.train(config=config, samples=samples, rewards=rewards, eval_prompts=prompts)
    assert len(trainer.store) == 4
