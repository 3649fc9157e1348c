"""Sweeps: their trials and what they find. Tests of Ray run if it is installed."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from tests.unit.test_space import ROOT, write_space
from trlx.launch import sweep as sweeping
from trlx.launch.cli import main
from trlx.launch.results import Result, ranked
from trlx.launch.script import check_script
from trlx.launch.space import read_space
from trlx.launch.sweep import Sweep
from trlx.launch.trial import Trial, TrialError, launch_command
from trlx.optional import is_available

needs_ray = pytest.mark.skipif(not is_available("ray"), reason="ray is not installed")

# Measures lr * (step + 1) at every even step up to 6; asked to save, it remembers its step, as a run of trlx does. It
# waits at a step until the file "go" beside it holds a number as high.
SCRIPT = """
import json, signal, sys, time
from pathlib import Path

def main(hparams):
    folder = Path(hparams["train.checkpoint_dir"])
    go, saved, asked = Path(__file__).with_name("go"), folder / "saved", []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    print("lr is", hparams["optimizer.kwargs.lr"])
    for step in range(int(saved.read_text()) + 1 if saved.exists() else 0, 7):
        while go.exists() and int(go.read_text() or 0) < step and not asked:
            time.sleep(0.01)
        if asked:
            saved.write_text(str(step - 1))
            sys.exit(75)
        if hparams["optimizer.kwargs.lr"] == 0:
            raise ValueError("a rate of nothing")
        measured = {"reward/mean": hparams["optimizer.kwargs.lr"] * (step + 1)} if step % 2 == 0 else {"loss": 1.0}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **measured}) + "\\n")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "measure.py"
    path.write_text(SCRIPT)
    yield path
    path.with_name("go").unlink(missing_ok=True)  # nobody is left waiting


def trial_of(script, metric="reward/mean", lr=1.0, **options):
    settings = {"optimizer.kwargs.lr": lr}
    return Trial(launch_command(str(script)), ROOT, script.parent / "trial", settings, metric, **options)


def swept(script, *options, values=(1.0, 3.0, 2.0), **tune):
    """(The exit status, the results in their order, the folder) of a sweep over learning rates."""
    out, found = script.parent / "out", []
    config = write_space(script.parent, {"optimizer.kwargs.lr": {"strategy": "grid", "values": list(values)}}, **tune)
    with pytest.MonkeyPatch.context() as patch:
        write = sweeping.write_results
        patch.setattr(sweeping, "write_results", lambda *given: found.append(given[1]) or write(*given))
        status = main(["sweep", str(script), "--config", str(config), "-y", "--out", str(out), *options])
    return status, found[0], out


def test_a_script_must_define_main(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def mian(hparams): pass\nif __name__ == '__main__': main({})\n")
    with pytest.raises(ValueError, match=r"defines no main\(hparams\)"):
        check_script(str(script))
    with pytest.raises(FileNotFoundError, match="there is no script nothing.here"):
        check_script("nothing.here")
    script.write_text("from json import loads as main\n")
    check_script(str(script))


def test_a_trial_hands_out_every_evaluation_from_the_first_to_the_last(script):
    trial = trial_of(script, lr=0.5)
    found = [trial.next_evaluation(0.02) for _ in range(5)]
    assert found == [{"step": step, "reward/mean": 0.5 * (step + 1)} for step in (0, 2, 4, 6)] + [None]
    assert json.loads((trial.folder / "trial.json").read_text())["optimizer.kwargs.lr"] == 0.5
    assert (trial.folder / "output.log").read_text() == "lr is 0.5\n"


def test_a_paused_trial_goes_on_from_its_checkpoint(script):
    script.with_name("go").write_text("2")
    trial = trial_of(script)
    assert [trial.next_evaluation(0.02)["step"] for _ in range(2)] == [0, 2]
    trial.pause()
    assert (trial.folder / "saved").read_text() == "2"
    script.with_name("go").write_text("9")
    restored = trial_of(script, seen=trial.seen)
    assert [restored.next_evaluation(0.02)["step"] for _ in range(2)] == [4, 6]
    assert restored.next_evaluation(0.02) is None
    assert (trial.folder / "output.log").read_text() == "lr is 1.0\n" * 2


def test_a_stopped_trial_has_no_process_left(script):
    script.with_name("go").write_text("0")
    trial = trial_of(script)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as ray does, and processes inherit it
    trial.next_evaluation(0.02)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process = trial._process
    trial.stop()
    assert process.returncode is not None
    assert "KeyboardInterrupt" in (trial.folder / "output.log").read_text()


def test_a_trial_that_fails_shows_the_end_of_its_output(script):
    trial = trial_of(script, lr=0)
    with pytest.raises(TrialError, match=r"ended with code 1(.|\n)*a rate of nothing"):
        trial.next_evaluation(0.02)


def test_a_metric_that_is_not_measured_ends_the_trial_at_its_first_evaluation(script):
    script.with_name("go").write_text("0")
    trial = trial_of(script, metric="reward/maen")
    with pytest.raises(TrialError, match="Did you mean 'reward/mean'"):
        trial.next_evaluation(0.02)
    trial.stop()


def test_a_metric_that_is_not_finite_ends_the_trial(script):
    script.with_name("go").write_text("-1")
    trial = trial_of(script)
    trial.folder.mkdir()
    (trial.folder / "metrics.jsonl").write_text('{"step": 0, "reward/mean": null}\n')
    with pytest.raises(TrialError, match="not a finite number at step 0"):
        trial.next_evaluation(0.02)
    trial.stop()


def test_several_processes_or_a_config_are_started_by_accelerate():
    def command(**options):
        return launch_command("s.py", **options)[1:]

    work = ["-m", "trlx.launch.script", "s.py"]
    accelerate = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    assert command(num_gpus=1) == work
    assert command(num_gpus=2) == [*accelerate, "--multi_gpu", "--num_processes", "2", *work]
    config = Path("ddp.yaml")
    assert command(accelerate_config=config) == [*accelerate, "--config_file", "ddp.yaml", *work]


def test_every_trial_has_a_seed_unless_the_seed_is_swept(script, monkeypatch):
    monkeypatch.chdir(script.parent)
    sweep = Sweep("measure.py", read_space(write_space(script.parent)))
    assert [sweep.space.hparams(number, {}) for number in range(2)] == [{"train.seed": 1000}, {"train.seed": 1001}]
    assert sweep.space.hparams(0, {"train.seed": 5}) == {"train.seed": 5}
    trial = sweep.trial(2, {"method.tau": 0.5})
    assert (trial.settings["train.project_name"], trial.settings["method.tau"]) == ("sweep_measure", 0.5)
    assert sweep.folder.parent == script.parent / "ckpts" / "sweeps"
    assert trial.folder == sweep.folder / "trial_002"


def test_a_folder_with_the_trials_of_another_sweep_is_refused(script):
    (script.parent / "out" / "trial_000").mkdir(parents=True)
    for local in ([], ["--local"]):
        with pytest.raises(SystemExit, match="out holds the trials of another sweep; name another folder"):
            swept(script, *local)


def test_a_sweep_without_ray_ranks_its_trials_and_writes_the_best(script, capsys):
    status, results, out = swept(script, "--local", values=[1.0, 3.0, 0, 2.0])
    assert status == 0
    assert [trial.name for trial in results] == ["trial_001", "trial_003", "trial_000", "trial_002"]
    assert [trial.is_ranked for trial in results] == [True] * 3 + [False]
    assert results[0].series == [(0, 3.0), (2, 9.0), (4, 15.0), (6, 21.0)]
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best == {"train": {"seed": 1001}, "optimizer": {"kwargs": {"lr": 3.0}}}
    page, printed = (out / "summary.html").read_text(), capsys.readouterr().out
    assert "data:image/png" in page
    assert "http" not in page
    for text in (page, printed):
        assert "a rate of nothing" in text
        assert "trial_001" in text


def test_the_lowest_is_best_where_the_mode_is_min():
    found = [Result(f"trial_{number}", {}, [(0, 9.0), (2, last)]) for number, last in enumerate((2.0, 1.0, 3.0))]
    assert [trial.name for trial in ranked(found, "min")] == ["trial_1", "trial_0", "trial_2"]
    assert [trial.name for trial in ranked(found, "max")] == ["trial_2", "trial_0", "trial_1"]


def test_a_trial_that_failed_is_not_ranked_by_what_it_measured_before():
    assert not Result("trial_000", {}, [(0, 9.0)], "out of memory").is_ranked
    assert Result("trial_000", {}, [(0, 9.0)]).is_ranked


def test_what_ray_returns_of_a_trial_becomes_a_result(script):
    sweep, values = Sweep(str(script), read_space(write_space(script.parent))), {"optimizer.kwargs.lr": np.float32(0.5)}
    table = {"step": [0, 2, 0], "reward/mean": [1.0, 2.0, 1.0]}  # a dict stands for pandas' table

    def result(config=None, table=None, error=None, name="trial_001"):
        return sweeping._result(
            sweep, SimpleNamespace(path=f"x/{name}", config=config, metrics_dataframe=table, error=error)
        )

    whole = {"train.seed": 1001, "optimizer.kwargs.lr": 0.5}
    again = result(values, table, name="trial_001_ab12")  # started again by Ray
    assert again == Result("trial_001", whole, [(0, 1.0), (2, 2.0)])
    assert result() == Result("trial_001", {"train.seed": 1001}, [])
    failed = RuntimeError("traces of Ray")
    failed.cause = TrialError("out of memory")
    assert result(values, error=failed).error == "out of memory"


def test_nothing_starts_before_someone_has_agreed(script, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "n")
    out = script.parent / "out"
    arguments = ["sweep", str(script), "--config", str(write_space(script.parent)), "--local", "--out", str(out)]
    assert main(arguments) == 1
    assert not out.exists()


def test_the_command_has_its_old_name_too(script):
    config = str(write_space(script.parent, scheduler="hyperband"))
    command = [sys.executable, "-m", "trlx.sweep", "-y", "--local", "--config", config, str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert (
        ended.stderr
        == "trlx sweep: --local knows search_alg random, scheduler fifo and no time_budget_s: leave --local out\n"
    )


@pytest.mark.skipif(is_available("ray"), reason="ray is installed")
def test_without_ray_the_error_says_how_to_install_it(script):
    with pytest.raises(SystemExit, match=r'needs ray, which is not installed: pip install "trlx\[sweep\]"'):
        swept(script)


@needs_ray
@pytest.mark.parametrize("scheduler", ["fifo", "hyperband", "asha"])
def test_a_sweep_on_ray_finds_the_best_of_a_grid(script, scheduler):
    _, results, out = swept(script, "--num_cpus", "1", scheduler=scheduler, max_evaluations=3)
    assert len(results) == 3
    assert results[0].hparams["optimizer.kwargs.lr"] == 3.0
    assert results[0].series[0] == (0, 3.0)
    seed = yaml.safe_load((out / "best.yaml").read_text())["train"]["seed"]
    assert results[0].name == f"trial_{seed - 1000:03d}"


@needs_ray
def test_the_same_command_runs_trials_again_that_failed_and_no_others(script):
    values, text = [1.0, 0], script.read_text()
    _, results, out = swept(script, "--num_cpus", "1", values=values)
    assert results[1].error.startswith("The run ended with code 1.")
    assert results[1].error.endswith("a rate of nothing")
    script.write_text(text.replace('lr"] == 0', 'lr"] < 0'))
    _, results, _ = swept(script, "--num_cpus", "1", values=values)
    assert [(trial.name, trial.error, len(trial.series)) for trial in results] == [
        ("trial_000", None, 4),
        ("trial_001", None, 4),
    ]
    assert [(out / f"trial_00{n}" / "output.log").read_text().count("lr is") for n in range(2)] == [1, 2]
    with pytest.raises(SystemExit, match="holds the trials of another sweep"):
        swept(script, "--num_cpus", "1", values=[5.0])


@needs_ray
@pytest.mark.skipif(is_available("bayes_opt"), reason="bayesian-optimization is installed")
def test_a_search_whose_package_is_missing_is_refused(script):
    from ray import tune

    with pytest.raises(ImportError, match='search_alg bayesopt needs packages of its own: pip install "bayesian-opt'):
        sweeping._searcher(tune, "bayesopt", {"metric": "reward/mean", "mode": "max"})


@needs_ray
def test_a_trial_that_needs_more_than_there_is_is_refused(script):
    with pytest.raises(SystemExit, match="a trial needs 9999 CPUs and there are"):
        swept(script, "--num_cpus", "9999")
