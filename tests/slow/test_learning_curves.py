"""What learning promises: minutes of training on examples/randomwalks, mean of three seeds.

On tensor and pipeline parallelism, in four processes, the same bars with one seed.
"""

import statistics

import pytest

from benchmarks.learning_curves import curve
from examples.randomwalks import ilql_randomwalks, pipeline, ppo_randomwalks
from tests.processes import finish, start
from trlx.launch.demo.training import pretrain
from trlx.report.records import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEEDS = (1, 2, 3)
DIVIDED = {
    "train.trainer_kwargs.tensor_model_parallel_size": 2,
    "train.trainer_kwargs.pipeline_model_parallel_size": 2,
    "train.save_best": False,
}


def mean_of(curves):
    return {step: statistics.mean(each[step] for each in curves) for step in curves[0]}


def test_ppo_finds_shortest_paths(tmp_path):
    walker = pretrain(tmp_path / "walker")
    mean = mean_of([curve(walker, "randomwalks", seed, samples=5, out=tmp_path) for seed in SEEDS])
    assert 0.25 < mean[0] < 0.45
    assert mean[60] >= 0.90
    assert mean[100] >= 0.97


@pytest.mark.parametrize(
    "changes", ["", "method.advantage=rloo method.kl_in=reward method.kl_coef=0.001"], ids=["grpo", "rloo"]
)
def test_grpo_and_rloo_find_shortest_paths(changes, tmp_path):
    walker = pretrain(tmp_path / "walker")
    for seed in SEEDS:
        found = curve(walker, f"randomwalks-grpo {changes}", seed, samples=5, out=tmp_path)
        assert 0.25 < found[0] < 0.45
        assert found[100] >= 0.95


def test_preferences_lead_to_shortest_paths_through_a_reward_model_and_without_one(tmp_path):
    curves = {name: dict(series) for name, series in pipeline.main(tmp_path).items()}
    assert max(curves["reward model"].values()) >= 0.9
    assert 0.25 < curves["DPO"][0] < 0.45
    true = curves["PPO, true reward"][120]
    assert true >= 0.97
    assert curves["PPO, reward model"][120] >= 0.9 * true
    assert curves["GRPO, reward model"][120] >= 0.8 * true
    assert curves["DPO"][200] >= 0.85


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


def in_four(fn, *args):
    """Runs a function of an example as a job of four processes that hold one model."""
    assert finish(start(4, fn, *args), timeout=1500) == [0] * 4


def ppo_in_parts(walker, out):
    source = {"model.model_path": str(walker)}
    schedule = {"train.seed": 1, "train.total_steps": 100, "train.eval_interval": 20, "train.checkpoint_dir": str(out)}
    ppo_randomwalks.main({**DIVIDED, **source, **schedule, "train.trainer": "NeMoPPOTrainer"})


def ilql_in_parts(out):
    schedule = {"train.seed": 1, "train.eval_interval": 28, "train.checkpoint_dir": str(out)}
    ilql_randomwalks.main({**DIVIDED, **schedule, "train.trainer": "NeMoILQLTrainer"})


def sft_in_parts(out):
    pretrain(out, hparams={**DIVIDED, "train.trainer": "NeMoSFTTrainer"})


def test_a_divided_model_learns_its_language_as_a_whole_one_does_and_ppo_then_finds_shortest_paths(tmp_path):
    whole, divided = pretrain(tmp_path / "whole"), tmp_path / "divided"
    in_four(sft_in_parts, divided)
    losses = [[loss for _, loss in read_metrics(walker / "sft")["loss"]] for walker in (whole, divided)]
    assert len(losses[0]) == 200
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    in_four(ppo_in_parts, divided, tmp_path / "ppo")
    optimality = dict(read_metrics(tmp_path / "ppo")["metrics/optimality"])
    assert 0.25 < optimality[0] < 0.45
    assert optimality[60] >= 0.90
    assert optimality[100] >= 0.97


def test_ilql_finds_shortest_paths_with_a_divided_model(tmp_path):
    in_four(ilql_in_parts, tmp_path)
    optimality = dict(read_metrics(tmp_path)["metrics/optimality@beta=100"])
    assert optimality[112] >= 0.85
    assert optimality[200] >= 0.95
