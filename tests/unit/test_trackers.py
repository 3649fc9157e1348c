"""Trackers beside a run's files: those of Accelerate on real packages, those of users, and those that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from trlx import register_tracker
from trlx.config import TRACKERS
from trlx.registry import trackers
from trlx.tracking import Sink, Tracker, remotes

NAMES = {"project": "p", "name": "r", "group": "g", "entity": "e", "tags": ["a", "b"]}
CONFIG = {"train": {"seed": 1, "tags": ["a"], "entity_name": None}}


@pytest.fixture(autouse=True)
def _registered_for_one_test(monkeypatch):
    monkeypatch.setattr(trackers, "_classes", {})


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    package = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # quicker than a database
    monkeypatch.setattr(package.tracking._tracking_service.utils, "_tracking_uri", (tmp_path / "mlruns").as_uri())
    return package.MlflowClient()


@pytest.fixture
def trackio(tmp_path_factory, monkeypatch):
    if "trackio" not in sys.modules:  # which reads it once
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
    return pytest.importorskip("trackio")


def test_the_config_knows_the_trackers_that_accelerate_knows():
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)


def test_mlflow_gets_a_run_that_goes_on_after_a_resume(tmp_path, mlflow):
    with Tracker("mlflow", tmp_path / "run", config=CONFIG, **NAMES) as tracker:
        tracker.log({"reward/mean@beta=0.5": torch.tensor(0.25), "kl": float("nan")}, step=1)
        tracker.log_samples("eval", 1, [{"prompt": "a", "reward": 1.0}])
        state = json.loads(json.dumps(tracker.state()))
    with Tracker("mlflow", tmp_path / "run", config={"train": {"seed": 2}}, state=state, **NAMES) as tracker:
        tracker.log({"kl": 2}, step=2)
        assert tracker.state()["mlflow_id"] == state["mlflow_id"]
    run = mlflow.get_run(state["mlflow_id"])
    points = [(point.step, point.value) for point in mlflow.get_metric_history(run.info.run_id, "kl")]
    assert str(points) == "[(1, nan), (2, 2.0)]" and run.data.metrics["reward/mean_beta_0.5"] == 0.25
    assert run.data.params == {"train.seed": "1", "train.tags": '["a"]', "train.entity_name": "None"}
    assert (mlflow.get_experiment(run.info.experiment_id).name, run.info.run_name, run.info.status) == (
        "p",
        "r",
        "FINISHED",
    )
    assert {"group": "g", "entity": "e", "tags": "a, b"}.items() <= run.data.tags.items()
    samples = mlflow.download_artifacts(run.info.run_id, "samples/eval_00000001.jsonl")
    assert json.loads(Path(samples).read_text()) == {"prompt": "a", "reward": 1.0}


def test_trackio_gets_a_run_that_goes_on_after_a_resume(tmp_path, trackio):
    with Tracker("trackio", tmp_path, config=CONFIG, **NAMES) as tracker:
        tracker.log({"reward/mean@beta=0.5": torch.tensor(0.25)}, step=1)
        tracker.log_samples("eval", 1, [{"prompt": "a", "reward": 1.0}])
        state = json.loads(json.dumps(tracker.state()))
    with Tracker("trackio", tmp_path / "other", **NAMES) as tracker:
        tracker.log({"kl": 9}, step=1)
    with Tracker("trackio", tmp_path, config=CONFIG, state=state, **NAMES) as tracker:
        tracker.log({"kl": 2}, step=2)
    runs = {run.name: run for run in trackio.Api().runs("p")}
    assert len(runs) == 2 and all(name.startswith("r-") for name in runs)
    history = trackio.sqlite_storage.SQLiteStorage.get_logs("p", state["trackio_name"])
    assert [line["step"] for line in history] == [1, 1, 2]
    assert (history[0]["reward/mean@beta=0.5"], history[2]["kl"]) == (0.25, 2)
    assert history[1]["samples"]["_value"] == [{"prompt": "a", "reward": 1.0}]
    config = runs[state["trackio_name"]].config
    assert config["train"] == CONFIG["train"] and config["_Group"] == "g"


@pytest.mark.parametrize(
    "name, made, arguments",
    [
        ("comet_ml", "start", {"project_name": "p", "workspace": "e"}),
        ("aim", "Run", {"repo": "FOLDER", "experiment": "p"}),
        ("clearml", "Task.init", {"project_name": "p", "task_name": "r", "tags": ["a", "b"]}),
        ("dvclive", "Live", {"dir": "FOLDER/dvclive", "resume": False}),
        ("swanlab", "init", {"project": "p", "name": "r", "workspace": "e", "group": "g", "tags": ["a", "b"]}),
    ],
)
def test_accelerates_other_trackers_get_the_names_of_the_run(name, made, arguments, tmp_path, monkeypatch):
    package = MagicMock(__version__="3.58.8")
    package.Task.current_task.return_value = None
    for module in (name, f"{name}.plots"):
        monkeypatch.setitem(sys.modules, module, package)
    monkeypatch.setenv("SWANLAB_INTERACTIVE", "true")
    monkeypatch.setattr("accelerate.tracking.PartialState", None)  # as on Megatron-Core: nobody makes one
    with Tracker(name, tmp_path, config=CONFIG, **NAMES) as tracker:
        tracker.log({"loss": 0.5}, step=3)
    call = [each for each in package.mock_calls if each[0] == made][0]
    expected = {key: str(value).replace("FOLDER", str(tmp_path)) for key, value in arguments.items()}
    assert expected.items() <= {key: str(value) for key, value in call.kwargs.items()}.items()
    logged = [each for each in package.mock_calls if 0.5 in (*each.args, *each.kwargs.values(), *values(each.args))]
    assert logged and any(each[0].rpartition(".")[2] in ("end", "close", "finish") for each in package.mock_calls)


def values(arguments: tuple) -> list:
    return [value for argument in arguments if isinstance(argument, dict) for value in argument.values()]


class Flaky(Sink):
    """Loses the network while `down`."""

    def __init__(self, run):
        self.down, self.lines, self.closed = False, [], False
        Flaky.last = self

    def log(self, metrics, step):
        self.lines += [(step, metrics)] if not self.down else self.missing

    def state(self):
        return {type(self).__name__: len(self.lines)} if not self.down else self.missing

    def close(self):
        self.closed = True

    @property
    def missing(self):
        raise ConnectionError("no network")


def test_a_tracker_that_fails_is_tried_again_later_and_ends_neither_the_run_nor_other_trackers(
    tmp_path, monkeypatch, caplog
):
    now = [100.0]
    monkeypatch.setattr(remotes.time, "monotonic", lambda: now[0])
    register_tracker("flaky")(Flaky)
    register_tracker("steady")(type("Steady", (Flaky,), {}))
    tracker = Tracker(["flaky", "steady"], tmp_path)
    steady, flaky = Flaky.last, tracker._sinks[1].sink
    for step, (down, seconds) in enumerate([(False, 0), (True, 0), (False, 59), (True, 2), (False, 61)]):
        flaky.down = down
        now[0] += seconds
        tracker.log({"loss": 0.5}, step)
        assert tracker.state()["Flaky"] == len(flaky.lines)
    assert [step for step, _ in flaky.lines] == [0, 4] and [step for step, _ in steady.lines] == [0, 1, 2, 3, 4]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "The tracker flaky failed (ConnectionError: no network): the run goes on" in told[0]
    flaky.down = True
    tracker.log({"loss": 0.5}, 5)
    tracker.close()
    assert flaky.closed and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_tracker_that_cannot_be_opened_ends_a_new_run_and_not_a_resumed_one(tmp_path, caplog):
    @register_tracker("closed")
    class Closed(Sink):
        def __init__(self, run):
            raise PermissionError("wrong key")

    words = r"train.tracker: closed cannot be opened \(PermissionError: wrong key\)"
    with pytest.raises(RuntimeError, match=f"{words}: repair that, or leave it out"):
        Tracker("closed", tmp_path)
    with Tracker("closed", tmp_path, state={"metrics_bytes": 0, "step": 0, "wandb_id": "run-6"}) as tracker:
        tracker.log({"loss": 0.5}, 1)
        assert tracker.state()["wandb_id"] == "run-6"
    assert "closed cannot be opened (PermissionError: wrong key): the run goes on without it" in caplog.text


def test_trackers_written_for_accelerate_can_be_registered_and_other_classes_cannot(tmp_path):
    @register_tracker("listing")
    class Listing(GeneralTracker):
        name, requires_logging_directory, lines = "listing", True, []

        def __init__(self, run_name, logging_dir):
            self.lines.append((run_name, logging_dir))

        @property
        def tracker(self):
            return self.lines

        def store_init_configuration(self, values):
            self.lines.append(values)

        def log(self, values, step=None):
            self.lines.append((step, values))

    with Tracker("listing", tmp_path, config=CONFIG, **NAMES) as tracker:
        tracker.log({"loss": 0.5}, step=3)
    settings = {"train.seed": 1, "train.tags": '["a"]', "train.entity_name": None}
    assert Listing.lines == [("p", str(tmp_path)), settings, (3, {"loss": 0.5})]
    register_tracker("counter")(dict)
    with pytest.raises(
        RuntimeError, match="dict must subclass trlx.tracking.Sink or accelerate.tracking.GeneralTracker"
    ):
        Tracker("counter", tmp_path)
