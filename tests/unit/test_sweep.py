"""Sweeps: their trials and what they find; two tests train on Ray itself."""

import json
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray import tune

from tests.unit.test_space import ROOT, write_space
from trlx.config import TRLConfig
from trlx.launch import sweep as sweeping
from trlx.launch import trial_process
from trlx.launch.cli import main
from trlx.launch.results import read_results, write_results
from trlx.launch.script import check_script
from trlx.launch.space import read_space
from trlx.launch.sweep import Sweep
from trlx.launch.trial import Trial, TrialError, launch_command
from trlx.presets import load_preset

# Measures lr * (step + 1) at every even step up to 6. At its end, or asked to save, it writes a checkpoint; it goes on
# from the newest one, as a run of trlx does. It waits at a step until the file "go" beside it holds a number as high.
SCRIPT = """
import json, signal, sys, time
from pathlib import Path

def main(hparams):
    folder = Path(hparams["train.checkpoint_dir"])
    go, asked = Path(__file__).with_name("go"), []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    print("lr is", hparams["optimizer.kwargs.lr"])
    steps = [int(path.name.split("_")[1]) for path in folder.glob("checkpoint_*")]

    def save(step):
        (folder / f"checkpoint_{step}").mkdir(exist_ok=True)
        (folder / f"checkpoint_{step}" / "trainer_state.json").write_text("{}")

    for step in range(max(steps, default=-1) + 1, 7):
        while go.exists() and int(go.read_text() or 0) < step and not asked:
            time.sleep(0.01)
        if asked:
            save(step - 1)
            sys.exit(75)
        if hparams["optimizer.kwargs.lr"] == 0:
            raise ValueError("a rate of nothing")
        measured = {"reward/mean": hparams["optimizer.kwargs.lr"] * (step + 1)} if step % 2 == 0 else {"loss": 1.0}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **measured}) + "\\n")
    save(6)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "measure.py"
    path.write_text(SCRIPT)
    yield path
    path.with_name("go").unlink(missing_ok=True)  # nobody is left waiting


def trial_of(script, metric="reward/mean", lr=1.0, **options):
    settings = {"optimizer.kwargs.lr": lr}
    return Trial(launch_command([str(script)]), ROOT, script.parent / "trial", settings, metric, **options)


def swept(script, *options, values=(1.0, 3.0, 2.0), **tune):
    """(The exit status, the folder) of a sweep over learning rates."""
    out = script.parent / "out"
    config = write_space(script.parent, {"optimizer.kwargs.lr": {"strategy": "grid", "values": list(values)}}, **tune)
    return main(["sweep", str(script), "--config", str(config), "-y", "--out", str(out), *options]), out


def rewards(trial: Path) -> list[float]:
    lines = map(json.loads, (trial / "metrics.jsonl").read_text().splitlines())
    return [line["reward/mean"] for line in lines if "reward/mean" in line]


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
    assert (trial.folder / "checkpoint_2").is_dir()
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


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("reward/maen", "Did you mean 'reward/mean'? It measures: reward/mean"),  # known at the first evaluation
        ("los", "Did you mean 'loss'? It measures: reward/mean, loss"),
    ],
)
def test_a_trial_without_the_metric_fails_and_names_what_it_measures(script, metric, told):
    trial = trial_of(script, metric=metric)
    with pytest.raises(TrialError, match=re.escape(told) + "$"):
        trial.next_evaluation(0.02)
    trial.stop()


def test_a_run_whose_sweep_was_killed_saves_and_ends(script):
    script.with_name("go").write_text("1")
    trial = trial_of(script)
    trial.next_evaluation(0.02)
    trial._process.stdin.close()  # as when the process that reads it is gone
    assert trial._process.wait() == 75
    assert (trial.folder / "checkpoint_1").is_dir()
    trial.stop()


def test_a_trial_goes_on_from_what_another_hands_over(tmp_path):
    def write(name, step, reward):
        folder = tmp_path / name
        (folder / f"checkpoint_{step}").mkdir(parents=True)
        (folder / f"checkpoint_{step}" / "trainer_state.json").write_text(f'"{name}"')
        (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "reward/mean": reward}) + "\n")
        return Trial([], tmp_path, folder, {"method.gamma": reward}, "reward/mean")

    good, bad = write("good", 4, 0.9), write("bad", 6, 0.1)
    bad.take(handed := good.hand_over())
    assert [path.name for path in bad.folder.glob("checkpoint_*")] == ["checkpoint_4"]
    assert (bad.folder / "checkpoint_4" / "trainer_state.json").read_text() == '"good"'
    assert rewards(bad.folder) == [0.9] and rewards(bad.folder / "earlier.1") == [0.1]
    (bad.folder / "checkpoint_4").rename(bad.folder / "checkpoint_5")
    bad.take(handed)  # the same once more, as after an interruption: it keeps what it did since
    assert (bad.folder / "checkpoint_5").is_dir()
    bad.settings["method.gamma"] = 0.5
    bad.take(handed)  # anew, with other settings
    assert (bad.folder / "checkpoint_4").is_dir() and not (bad.folder / "checkpoint_5").exists()
    for step in (5, 6, 7, 8):
        (good.folder / f"checkpoint_{step - 1}").rename(good.folder / f"checkpoint_{step}")
        good.hand_over()
    with pytest.raises(TrialError, match=f"has no checkpoint {handed} any more"):
        write("late", 1, 0.0).take(handed)
    with pytest.raises(TrialError, match="has no checkpoint$"):
        write("later", 1, 0.0).take(Trial([], tmp_path, tmp_path / "none", {}, "reward/mean").hand_over())


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
        return launch_command(["s.py"], **options)[1:]

    work = ["-m", "trlx.launch.trial_process", "{}", "s.py"]
    accelerate = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    assert command(num_gpus=1) == work
    assert command(num_gpus=2) == [*accelerate, "--multi_gpu", "--num_processes", "2", *work]
    config = Path("ddp.yaml")
    assert command(accelerate_config=config) == [*accelerate, "--config_file", "ddp.yaml", *work]


def test_every_trial_has_a_folder_and_a_seed_unless_the_seed_is_swept(script, monkeypatch):
    monkeypatch.chdir(script.parent)
    sweep = Sweep("measure.py", space := read_space(write_space(script.parent)))
    assert space.hparams(1, {"train.seed": 5}) == {"train.seed": 5}
    sweep.command = []
    trial = sweep.trial("trial_002_ab12", {"method.tau": 0.5})  # Ray adds to the name of a trial that starts again
    found = [trial.settings[f"train.{name}"] for name in ("seed", "project_name", "resume_from_checkpoint")]
    assert found == [1002, "sweep_measure", "auto"]
    assert trial.settings["method.tau"] == 0.5
    assert sweep.folder.parent == script.parent / "ckpts" / "sweeps"
    assert trial.folder == sweep.folder / "trial_002"
    # what one trial begins another goes on with
    assert read_space(write_space(script.parent, scheduler="pbt")).hparams(1, {})["train.seed"] == 1000


def test_a_folder_with_the_trials_of_another_sweep_is_refused(script):
    (script.parent / "out" / "trial_000").mkdir(parents=True)
    with pytest.raises(SystemExit, match="out holds the trials of another sweep; name another folder"):
        swept(script)


def test_trials_are_ranked_by_their_last_evaluation_and_the_best_becomes_a_preset(tmp_path, capsys):
    space = read_space(write_space(tmp_path))
    for number, values in enumerate([[5.0, 2.0], [1.0, 3.0], [9.0], []]):
        folder = tmp_path / f"trial_{number:03d}"
        folder.mkdir()
        settings = {"train.seed": 1000 + number, "optimizer.kwargs.lr": float(number), "train.checkpoint_dir": "x"}
        (folder / "trial.json").write_text(json.dumps(settings))
        lines = [json.dumps({"step": step, "reward/mean": value}) for step, value in enumerate(values)]
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    results = read_results(tmp_path, space, {"trial_002": "out of memory"})
    assert [trial.name for trial in results] == ["trial_001", "trial_000", "trial_002", "trial_003"]
    assert [trial.is_ranked for trial in results] == [True, True, False, False]
    page, best = write_results(tmp_path, results, space)
    assert yaml.safe_load(best.read_text()) == {"train": {"seed": 1001}, "optimizer": {"kwargs": {"lr": 1.0}}}
    assert TRLConfig.load_yaml(ROOT / "configs" / "ppo.yaml", best).optimizer.kwargs["lr"] == 1.0
    assert "trial_002: out of memory\n" in capsys.readouterr().out
    assert all(trial.name in page.read_text() for trial in results)
    space.tune.mode = "min"
    assert [trial.name for trial in read_results(tmp_path, space, {})][:3] == ["trial_000", "trial_001", "trial_002"]


def test_nothing_starts_before_someone_has_agreed(script, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "n")
    out = script.parent / "out"
    assert main(["sweep", str(script), "--config", str(write_space(script.parent)), "--out", str(out)]) == 1
    assert not out.exists()


def test_the_command_has_its_old_name_too(script):
    config = str(write_space(script.parent))
    command = [
        sys.executable,
        "-m",
        "trlx.sweep",
        "--local",
        "--server_address",
        "a:1",
        "--config",
        config,
        str(script),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert ended.stderr == "trlx sweep: --local is this machine and --server_address another: leave one out\n"


def test_without_ray_the_error_says_how_to_install_it(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r'needs ray, which is not installed: pip install "trlx\[sweep\]"'):
        swept(script)


def test_a_search_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr("ray.tune.search.bayesopt.bayesopt_search.byo", None)
    with pytest.raises(ImportError, match='search_alg bayesopt needs packages of its own: pip install "bayesian-opt'):
        sweeping._searcher(tune, "bayesopt")


def test_a_trial_gets_what_there_is_and_no_more():
    assert sweeping._resources({"CPU": 2.0}, None, None) == {"cpu": 2, "gpu": 0}
    assert sweeping._resources({"CPU": 64.0, "GPU": 8.0}, None, None) == {"cpu": 4, "gpu": 1}
    assert sweeping._resources({"CPU": 64.0, "GPU": 8.0}, 4, 2) == {"cpu": 8, "gpu": 4}
    with pytest.raises(ValueError, match="a trial needs 9 CPUs and there are 2: lower --num_cpus"):
        sweeping._resources({"CPU": 2.0}, None, 9)


def test_trials_start_on_the_gpus_and_with_the_config_that_are_asked_for(script, monkeypatch):
    started, there = [], SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": 2.0})
    monkeypatch.setattr(sweeping, "_ray", lambda address: nullcontext(there))
    monkeypatch.setattr(sweeping, "_fit", lambda sweep, resources: started.append((sweep.command, resources)) or {})
    assert swept(script, "--num_gpus", "2", "--accelerate_config", str(script))[0] == 1
    assert started == [(launch_command([str(script)], 2, script), {"cpu": 8, "gpu": 2})]


def test_the_words_of_a_training_command_stand_in_place_of_a_script(tmp_path, monkeypatch):
    path, started = write_space(tmp_path, {"method.gamma": {"strategy": "grid", "values": [0.9, 1.0]}}), []
    monkeypatch.setattr(sweeping, "run", lambda **given: started.append(given) or 0)
    assert main(["sweep", "ppo", "train.seed=7", "--model", "tiny", "--config", str(path)]) == 0
    job = started[0]["work"]
    assert Sweep(job, read_space(path)).words == ["trlx", "ppo", "train.seed=7", "--model", "tiny"]
    with pytest.raises(SystemExit, match="a script takes its settings from .* alone: leave out --model tiny"):
        main(["sweep", "examples/architext.py", "--model", "tiny", "--config", str(path)])
    wrong = write_space(tmp_path, {"method.gamme": {"strategy": "choice", "values": [0.9]}})
    with pytest.raises(ValueError, match="Did you mean 'gamma'"):
        Sweep(job, read_space(wrong))


def test_the_settings_of_a_trial_go_to_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "trial.json").write_text('{"method.target": null, "train.tags": ["a"]}')
    monkeypatch.setenv("RANK", "1")  # the first process writes its id and watches for the end of the sweep
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(trial_process, "main", lambda words: words)
    words = trial_process._run_as_told(tmp_path / "trial.json", ["trlx", "ppo", "--model", "tiny"])
    assert words == ["ppo", "--model", "tiny", "method.target=null", 'train.tags=["a"]']


@pytest.mark.parametrize("name", ["ppo_sweep", "ilql_sweep"])
@pytest.mark.parametrize("search", ["random", "optuna"])
def test_the_sweeps_that_come_along_go_through_rays_searches(name, search):
    space = read_space(ROOT / "configs" / "sweeps" / f"{name}.yaml")
    space.tune.search_alg = search
    made = sweeping._tune_config(tune, space)
    if search == "random":
        drawn = space.drawn()[:3]
    else:
        made.search_alg.set_search_properties("reward/mean", "max", sweeping._param_space(tune, space))
        drawn = [made.search_alg.suggest(str(number)) for number in range(3)]
    for number, chosen in enumerate(drawn):
        settings = space.hparams(number, chosen)
        assert settings.keys() == {"train.seed", *space.fixed, *space.varied}
        config = TRLConfig.update(load_preset(name.removesuffix("_sweep")), settings)
        assert 1e-6 <= config.optimizer.kwargs["lr"] <= 1e-3


def test_schedulers_get_their_arguments_and_refuse_others(tmp_path):
    entries = {
        "optimizer.kwargs.lr": {"strategy": "loguniform", "values": [1e-6, 1e-3]},
        "method.ppo_epochs": {"strategy": "choice", "values": [1, 4]},
    }

    def made(**given):
        return sweeping._scheduler(tune, read_space(write_space(tmp_path, entries, **given)))

    asked = {"metric": "loss", "mode": "min", "num_samples": 3, "max_concurrent_trials": 2, "time_budget_s": 9}
    config = sweeping._tune_config(tune, read_space(write_space(tmp_path, entries, **asked)))
    assert {name: getattr(config, name) for name in asked} == asked
    assert made(scheduler="asha", max_evaluations=9)._max_t == 9
    pbt = made(scheduler="pbt", scheduler_kwargs={"quantile_fraction": 0.5, "perturbation_interval": 2})
    assert (pbt._quantile_fraction, pbt._perturbation_interval, pbt._time_attr) == (0.5, 2, "training_iteration")
    # mutation multiplies numbers, which must stay in their range
    assert pbt._custom_explore_fn({"optimizer.kwargs.lr": 2e-3, "method.ppo_epochs": 4}) == {
        "optimizer.kwargs.lr": 1e-3,
        "method.ppo_epochs": 4,
    }
    with pytest.raises(ValueError, match="scheduler_kwargs: pbt has no argument 'quantile'. Known: time_attr, metric"):
        made(scheduler="pbt", scheduler_kwargs={"quantile": 0.5})


@pytest.fixture(scope="module")
def ray():
    """Ray, started once for the tests that train on it."""
    with pytest.MonkeyPatch.context() as patch, sweeping._ray("local") as started:
        patch.setattr(sweeping, "_ray", lambda address: nullcontext(started))
        yield started


def test_the_same_command_runs_trials_again_that_failed_and_no_others(script, ray, capsys):
    text = script.read_text()
    assert swept(script, "--num_cpus", "1", values=[0, 2.0])[0] == 0
    printed = capsys.readouterr().out
    assert "trial_000 failed\n" in printed and "ValueError: a rate of nothing" in printed
    assert "trial_001: reward/mean 14 at step 6\n" in printed
    script.write_text(text.replace('lr"] == 0', 'lr"] < 0'))
    _, out = swept(script, "--num_cpus", "1", values=[0, 2.0])
    printed = capsys.readouterr().out
    assert "failed" not in printed and "not ended" not in printed
    assert [rewards(out / f"trial_00{n}") for n in range(2)] == [[0, 0, 0, 0], [2, 6, 10, 14]]
    assert [(out / f"trial_00{n}" / "output.log").read_text().count("lr is") for n in range(2)] == [2, 1]
    assert yaml.safe_load((out / "best.yaml").read_text())["train"]["seed"] == 1001
    assert "trial_000" in (out / "report.html").read_text()
    with pytest.raises(SystemExit, match="out holds the trials of another sweep"):
        swept(script, values=[5.0])


@pytest.mark.slow
def test_in_pbt_the_worse_trial_goes_on_from_the_better_one_with_other_settings(script, ray):
    kwargs = {"perturbation_interval": 3, "quantile_fraction": 0.5, "synch": True, "resample_probability": 0}
    status, out = swept(script, "--num_cpus", "1", values=[1.0, 3.0], scheduler="pbt", scheduler_kwargs=kwargs)
    assert status == 0
    assert rewards(out / "trial_000")[:2] == rewards(out / "trial_001")[:2] == [3.0, 9.0]
    assert rewards(out / "trial_000" / "earlier.1")[:2] == [1.0, 3.0]
