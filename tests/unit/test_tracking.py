"""Nothing a run writes is lost, and a resumed run's metrics read as if it had never stopped."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import trlx
from tests.runs import tiny_config
from trlx.tracking import Tracker, default_run_name, git, names, remotes


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def wandb(monkeypatch):
    """Stands for the wandb package: logged in, and remembers what it was told."""
    calls = SimpleNamespace(logged=[], finished=0, logged_in=True, options=None)
    run = SimpleNamespace(
        id="run-7",
        log=lambda values, step: calls.logged.append((step, values)),
        finish=lambda: setattr(calls, "finished", calls.finished + 1),
    )

    def init(**options):
        calls.options = options
        return run

    def login(prompt, verify):
        assert not prompt, "a training run never asks"
        return calls.logged_in

    module = SimpleNamespace(init=init, login=login, Table=lambda columns, data, **_: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "debug"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_every_call_is_a_line_and_what_is_not_finite_is_null(tmp_path):
    with Tracker(None, tmp_path) as tracker:
        tracker.log({"loss": 0.5, "kl": float("nan"), "grad_norm": float("inf")}, step=0)
        tracker.log({"loss": torch.tensor(0.25)}, step=10)
    expected = [{"step": 0, "loss": 0.5, "kl": None, "grad_norm": None}, {"step": 10, "loss": 0.25}]
    assert lines(tmp_path / "metrics.jsonl") == expected


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    tracker = Tracker("none", tmp_path)
    tracker.log({"loss": 1.0}, step=0)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]


def test_samples_of_each_evaluation_have_a_file(tmp_path):
    with Tracker(None, tmp_path) as tracker:
        tracker.log_samples("eval", 20, [{"prompt": "a", "output": "é\n", "reward": 1.0}, {"reward": float("nan")}])
    written = lines(tmp_path / "samples" / "eval_00000020.jsonl")
    assert written == [{"prompt": "a", "output": "é\n", "reward": 1.0}, {"reward": None}]


def test_a_resumed_run_continues_where_its_checkpoint_was_and_keeps_what_it_abandons(tmp_path):
    with Tracker(None, tmp_path) as tracker:
        tracker.log({"loss": 3.0}, step=1)
        state = json.loads(json.dumps(tracker.state()))
        tracker.log({"loss": 2.0}, step=2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    with Tracker(None, tmp_path, state=state) as tracker:
        tracker.log({"loss": 2.5}, step=2)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
    abandoned = (tmp_path / "metrics.abandoned.jsonl").read_text()
    assert abandoned == '{"step": 2, "loss": 2.0}\n{"step": 3, "lo\n'


def test_a_new_run_in_an_old_folder_sets_the_old_files_aside(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        with Tracker(None, tmp_path) as tracker:
            tracker.log({"loss": loss}, step=0)
            tracker.log_samples("eval", 0, [{"loss": loss}])
    for folder, loss in (("earlier.1", 1.0), ("earlier.2", 2.0), (".", 3.0)):
        assert lines(tmp_path / folder / "metrics.jsonl") == [{"step": 0, "loss": loss}]
        assert lines(tmp_path / folder / "samples" / "eval_00000000.jsonl") == [{"loss": loss}]
        assert (tmp_path / folder / "config.json").is_file()


def test_what_an_older_run_abandoned_and_what_tensorboard_has_of_it_is_set_aside_too(tmp_path):
    rest = "alarms.jsonl digests.jsonl dumps dvclive environment.jsonl metrics.abandoned.jsonl report.html report.png"
    old = [*rest.split(), "tensorboard"]
    for name in old:
        (tmp_path / name).mkdir()
    Tracker(None, tmp_path).close()
    assert sorted(path.name for path in (tmp_path / "earlier.1").iterdir()) == old


def test_a_tracker_that_is_closed_twice_still_says_where_it_was(tmp_path):
    tracker = Tracker(None, tmp_path)
    tracker.log({"loss": 0.5}, step=3)
    state = tracker.state()
    for _ in range(2):
        tracker.close()
        assert tracker.last_state == state and state["step"] == 3


def test_the_file_of_another_run_is_not_cut_but_set_aside(tmp_path):
    with Tracker(None, tmp_path) as tracker:
        tracker.log({"other": 1.0}, step=0)
    with Tracker(None, tmp_path, state={"metrics_bytes": 10, "step": 5}) as tracker:
        tracker.log({"loss": 1.0}, step=6)
    assert lines(tmp_path / "earlier.1" / "metrics.jsonl") == [{"step": 0, "other": 1.0}]
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 6, "loss": 1.0}]


def test_a_checkpoint_without_tracker_state_starts_a_new_file(tmp_path):
    with Tracker(None, tmp_path, state={}) as tracker:
        tracker.log({"loss": 1.0}, step=6)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 6, "loss": 1.0}]


def test_other_processes_write_nothing(tmp_path, wandb):
    with Tracker("wandb", tmp_path / "run", is_main=False, watchers=[pytest.fail]) as tracker:
        tracker.log({"loss": 1.0}, step=0)
        tracker.log_samples("eval", 0, [{}])
        assert tracker.state() == {}
    assert not (tmp_path / "run").exists()
    assert wandb.options is None


def test_wandb_gets_the_run_its_metrics_and_tables(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(remotes, "git", lambda *arguments: "main" if arguments[0] == "branch" else "abc123")
    tags, config = ["mine"], {"train": {"seed": 1}}
    with Tracker("wandb", tmp_path, project="p", name="r", group="g", entity="e", tags=tags, config=config) as run:
        run.log({"loss": 0.5}, step=3)
        run.log_samples("eval", 3, [{"prompt": "a", "reward": torch.tensor(1.0)}])
        run.log_samples("rollout", 3, [{"prompt": "b"}])
        assert run.state()["wandb_id"] == "run-7"
    table = (["prompt", "reward"], [["a", 1.0]])
    assert wandb.logged == [(3, {"loss": 0.5}), (3, {"samples": table})]
    assert wandb.finished == 1
    options = {"project": "p", "name": "r", "group": "g", "entity": "e", "tags": ["mine", "main/abc123"]}
    assert options.items() <= wandb.options.items()
    assert wandb.options["mode"] is None
    assert wandb.options["config"] == config
    assert tags == ["mine"]
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 0.5}]


def test_wandb_gets_the_names_that_the_config_says(tmp_path, wandb):
    names = {"project_name": "p", "run_name": "r", "group_name": "g", "entity_name": "e", "tags": ["mine"]}
    Tracker.of(tiny_config(tmp_path, "SFT", train={"tracker": "wandb", **names}), 1, True, None).close()
    told = [wandb.options[name.removesuffix("_name").replace("run", "name")] for name in names]
    assert told[:4] == list("prge") and told[4][0] == "mine"


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, wandb):
    Tracker("wandb", tmp_path, state={"metrics_bytes": 0, "step": 1, "wandb_id": "run-6"})
    assert (wandb.options["id"], wandb.options["resume"]) == ("run-6", "allow")


def test_without_credentials_wandb_runs_offline_and_says_so_once(tmp_path, wandb, caplog):
    wandb.logged_in = False
    Tracker("wandb", tmp_path)
    assert wandb.options["mode"] == "offline"
    assert len(caplog.records) == 1
    assert "Not logged in" in caplog.text


def test_the_users_wandb_mode_is_left_alone(tmp_path, wandb, monkeypatch):
    wandb.logged_in = False
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Tracker("wandb", tmp_path)
    assert wandb.options["mode"] is None


def test_the_variable_debug_switches_wandb_off(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("debug", "1")
    Tracker("wandb", tmp_path).log({"loss": 1.0}, step=0)
    assert wandb.options is None
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]


def test_only_the_default_tracker_may_be_missing_which_costs_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("debug", raising=False)
    for name in ("wandb", "aim"):
        monkeypatch.setitem(sys.modules, name, None)
    with Tracker("wandb", tmp_path) as tracker:
        tracker.log({"loss": 1.0}, step=0)
    assert ["wandb is not installed" in record.getMessage() for record in caplog.records] == [True]
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]
    with pytest.raises(ImportError, match=r'train.tracker: wandb is not installed: pip install "trlx\[wandb\]"'):
        Tracker(["tensorboard", "wandb"], tmp_path)
    with pytest.raises(ImportError, match="train.tracker: aim is not installed: pip install aim, or leave it out"):
        trlx.train(samples=["ab"], config=tiny_config(tmp_path, "SFT", train={"tracker": "aim"}))


def test_tensorboard_gets_scalars_and_a_config_that_stays_as_it_was(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {"optimizer": {"kwargs": {"betas": [0.9, 0.95]}}, "train": {"run_name": None}}
    with Tracker("tensorboard", tmp_path, config=config) as tracker:
        tracker.log({"loss": 0.5}, step=4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 0.5)]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("    {") and json.loads(text) == config
    assert config == {"optimizer": {"kwargs": {"betas": [0.9, 0.95]}}, "train": {"run_name": None}}


def test_a_resumed_run_hides_what_tensorboard_got_after_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker("tensorboard", tmp_path) as tracker:
        tracker.log({"loss": 3.0}, step=1)
        state = tracker.state()
        tracker.log({"loss": 9.0}, step=2)
    with Tracker("tensorboard", tmp_path, state=state) as tracker:
        tracker.log({"loss": 2.0}, step=2)
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in scalars] == [(1, 3.0), (2, 2.0)]


def test_a_run_is_named_by_script_model_processes_and_branch(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/ppo_sentiments.py"])
    monkeypatch.setattr(names, "git", lambda *_: "main")
    assert default_run_name("lvwerra/gpt2-imdb", 8) == "ppo_sentiments/gpt2-imdb/8gpus:main"
    monkeypatch.setattr(names, "git", lambda *_: "")
    assert default_run_name({"_name_or_path": "", "model_type": "gpt2"}, 1) == "ppo_sentiments/gpt2/1gpu"
    named = {"_name_or_path": "EleutherAI/pythia-1b", "model_type": "gpt_neox"}
    assert default_run_name(named, 1) == "ppo_sentiments/pythia-1b/1gpu"


def test_no_git_and_no_repository_are_no_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git("branch", "--show-current") == ""
    monkeypatch.setenv("PATH", "")
    assert git("branch", "--show-current") == ""
