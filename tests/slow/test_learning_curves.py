"""What learning promises: minutes of training on examples/randomwalks, mean of three seeds."""

import statistics

import pytest

from benchmarks.learning_curves import curve
from examples.randomwalks import ilql_randomwalks
from examples.randomwalks.sft_randomwalks import pretrain
from trlx.launch.report import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEEDS = (1, 2, 3)


def mean_of(curves):
    return {step: statistics.mean(each[step] for each in curves) for step in curves[0]}


def test_ppo_finds_shortest_paths(tmp_path):
    walker = pretrain(tmp_path / "walker")
    mean = mean_of([curve(walker, "randomwalks", seed, samples=5, out=tmp_path) for seed in SEEDS])
    assert 0.25 < mean[0] < 0.45
    assert mean[60] >= 0.90
    assert mean[100] >= 0.97


def test_ilql_finds_shortest_paths_from_a_random_model(tmp_path):
    curves = []
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        changes = {"train.seed": seed, "train.checkpoint_dir": str(folder), "train.eval_interval": 28}
        ilql_randomwalks.main({**changes, "train.save_best": False})
        curves.append(dict(read_metrics(folder)["metrics/optimality@beta=100"]))
    mean = mean_of(curves)
    assert mean[112] >= 0.85
    assert mean[200] >= 0.95
