"""The files of sweeps, and the values that strategies draw."""

import re
from pathlib import Path

import pytest
import yaml

from trlx.launch.space import Parameter, Space, TuneConfig, read_space, trials
from trlx.launch.sweep import _chosen

ROOT = Path(__file__).parents[2]


def write_space(folder, entries=None, **tune):
    entries = {"optimizer.kwargs.lr": {"strategy": "grid", "values": [1.0, 3.0, 2.0]}} if entries is None else entries
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"tune_config": {"metric": "reward/mean", **tune}, **entries}))
    return path


def test_grids_are_tried_at_every_point_as_often_as_num_samples_says(tmp_path):
    entries = {
        "a": {"strategy": "grid", "values": [1, 2]},
        "b": {"strategy": "grid_search", "values": ["x", "y", "z"]},
        "c": {"strategy": "choice", "values": [7]},
    }
    space = read_space(write_space(tmp_path, entries, num_samples=2))
    points = [(point["a"], point["b"]) for point in space.drawn()]
    assert points == [(1, "x"), (2, "x"), (1, "y"), (2, "y"), (1, "z"), (2, "z")] * 2
    assert space.num_trials == 12
    assert space.fixed == {"c": 7}
    assert list(space.varied) == ["a", "b"]


def test_trials_without_a_search_have_seeds_and_are_drawn_alike_each_time(tmp_path):
    entries = {
        "method.a": {"strategy": "grid", "values": [1, 2]},
        "method.b": {"strategy": "uniform", "values": [0.0, 1.0]},
        "method.c": {"strategy": "choice", "values": ["x"]},
    }
    drawn = trials(path := write_space(tmp_path, entries, num_samples=2))
    assert [(each["train.seed"], each["method.a"], each["method.c"]) for each in drawn] == [
        (1000, 1, "x"),
        (1001, 2, "x"),
        (1002, 1, "x"),
        (1003, 2, "x"),
    ]
    assert len({each["method.b"] for each in drawn}) == 4
    assert all(type(each["method.b"]) is float for each in drawn)
    assert trials(path) == drawn
    seeds = {"train.seed": {"strategy": "grid", "values": [5, 6]}}
    assert trials(write_space(tmp_path, seeds)) == [{"train.seed": 5}, {"train.seed": 6}]
    with pytest.raises(ValueError, match="scheduler asha, which choose by results"):
        trials(write_space(tmp_path, seeds, scheduler="asha"))


@pytest.mark.parametrize(
    ("strategy", "values", "allowed"),
    [
        ("randint", (1, 4), {1, 2, 3}),
        ("qrandint", (2, 6, 2), {2, 4, 6}),
        ("lograndint", (1, 4), {1, 2, 3}),
        ("qlograndint", (10, 30, 10), {10, 20, 30}),
        ("quniform", (0.0, 1.0, 0.5), {0.0, 0.5, 1.0}),
        ("qloguniform", (1, 4, 1), {1, 2, 3, 4}),
        ("qrandn", (0, 0.001, 5), {0}),
        ("choice", ("a", None), {"a", None}),
    ],
)
def test_a_strategy_draws_every_value_it_may_and_no_other(strategy, values, allowed, tmp_path):
    entry = {"a": {"strategy": strategy, "values": list(values)}}
    assert {each["a"] for each in read_space(write_space(tmp_path, entry, num_samples=99)).drawn()} == allowed


def test_a_number_within_the_bounds_stands_for_a_value():
    assert Parameter("loguniform", (1e-4, 1.0)).decode(-4.605170186) == pytest.approx(0.01)
    assert Parameter("quniform", (0, 10, 5)).decode(7.4) == 5
    assert Parameter("randint", (0, 3)).decode(3.0) == 2
    assert Parameter("qrandint", (0, 3, 1)).decode(3.9) == 3
    space = Space(TuneConfig("loss", search_alg="bayesopt"), {"lr": Parameter("loguniform", (1e-4, 1.0))}, {})
    assert _chosen(space, {"lr": -4.605170186}) == {"lr": pytest.approx(0.01)}


WRONG = [
    ({"strategy": "unifrom", "values": [0, 1]}, "unknown strategy 'unifrom'. Did you mean 'uniform'?"),
    ({"strategy": "uniform", "values": [0, 1, 2]}, "uniform takes the values [low, high]; got [0, 1, 2]"),
    ({"strategy": "qloguniform", "values": [1, 2]}, "takes the values [low, high, q], and the base of the logarithm"),
    ({"strategy": "qrandn", "values": [0, 1]}, "qrandn takes the values [mean, standard deviation, q]"),
    ({"strategy": "uniform", "values": [1, 0]}, "low must be below high"),
    ({"strategy": "loguniform", "values": [0, 1]}, "low must be above 0"),
    ({"strategy": "quniform", "values": [0, 1, 0]}, "q must be above 0"),
    ({"strategy": "randint", "values": [0.5, 2]}, "must be integers"),
    ({"strategy": "uniform", "values": ["a", 2]}, "must be numbers"),
    ({"strategy": "choice", "values": []}, "a list that is not empty"),
    ({"strategy": "choice"}, "must have strategy and values"),
    (0.1, "must have strategy and values"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG)
def test_a_wrong_entry_is_an_error_that_says_what_to_write(tmp_path, entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_space(write_space(tmp_path, {"train.seed": entry}))


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"search_alg": "bayes"}, "unknown value 'bayes'. Did you mean 'bayesopt'?"),
        ({"scheduler": "hyperbend"}, "unknown value 'hyperbend'. Did you mean 'hyperband'?"),
        ({"mode": "maximum"}, "tune_config.mode: unknown value 'maximum'. Did you mean 'max'?"),
        ({"num_sample": 3}, "Unknown key 'tune_config.num_sample'. Did you mean 'num_samples'?"),
        ({"search_alg": "bohb"}, "be hyperbandforbohb with search_alg bohb"),
        ({"search_alg": "bayesopt"}, "search_alg bayesopt cannot choose by grid"),
    ],
)
def test_a_wrong_search_is_an_error_that_says_what_to_write(tmp_path, tune, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_space(write_space(tmp_path, **tune))


def test_folders_and_checkpoints_cannot_be_swept(tmp_path):
    entry = {"strategy": "choice", "values": ["a", "b"]}
    with pytest.raises(ValueError, match="every trial gets a folder of its own"):
        read_space(write_space(tmp_path, {"train.checkpoint_dir": entry}))


def test_a_missing_file_is_an_error_that_knows_the_other_ending(tmp_path):
    path = write_space(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*space\.yaml\?"):
        read_space(path.with_suffix(".yml"))
