"""``trlx submit`` without SLURM: its batch script, what it refuses, and how it follows a job."""

import os
import shlex
import subprocess
import sys

import pytest

from tests.builders import char_tokenizer, tiny_gpt2
from tests.unit.test_cli import failure
from trlx.launch.cli import main
from trlx.launch.slurm import follow as following
from trlx.launch.slurm import submit as submitting
from trlx.launch.slurm.request import Request, seconds_of

TINY = ["ppo", "--model", "tiny", "--out", "my run"]
SWEEP = """
tune_config: {metric: reward/mean, num_samples: 2, max_concurrent_trials: 3}
method.gamma: {strategy: grid, values: [0.5, 1]}
optimizer.kwargs.lr: {strategy: choice, values: [0.25]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path


@pytest.fixture
def submitted(folder, monkeypatch):
    """The file with the arguments of an sbatch that takes everything as job 12."""
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text('#!/bin/sh\necho "$@" >submitted; echo 12\n')
    (folder / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    return folder / "submitted"


def options_and_rest(script: str) -> tuple[list[str], str]:
    """The options for sbatch, and what follows the functions."""
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    words = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    return words, script.rpartition("\n}\n")[2]


def test_the_batch_script_stands_in_the_folder_of_the_run_and_needs_no_other_file(folder, submitted, monkeypatch):
    monkeypatch.setenv("HF_HOME", "cache")
    asks = "--nodes 2 --gpus-per-node 4 --cpus 3 --time 1-0 --partition long --sbatch account=lab --save-before 60"
    assert main(["submit", "train", *TINY, "train.seed=7", *asks.split(), "--requeues", "5", "--no-follow"]) == 0
    run = folder / "my run"
    assert submitted.read_text() == f"--parsable {run}/submit.sbatch\n"
    options, rest = options_and_rest((run / "submit.sbatch").read_text())
    names = ["--job-name=my run", f"--chdir={folder}", f"--output={run}/slurm-%j.log"]
    much = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=12", "--gpus-per-node=4", "--time=1-0"]
    again = ["--partition=long", "--signal=B:USR1@60", "--requeue", "--open-mode=append", "--account=lab"]
    assert options == [*names, *much, *again]
    assert shlex.split(rest) == shlex.split(
        f"export HF_HOME={folder}/cache REQUEUES=5 PYTHON={sys.executable} folder='{run}' "
        "run trlx train ppo train.seed=7 --model tiny --out 'my run' train.checkpoint_dir=$folder"
    )


@pytest.mark.parametrize(
    "asked, line",
    [
        ({"gpus_per_node": 0, "venv": "env"}, "export CUDA_VISIBLE_DEVICES=\nPYTHON={here}/env/bin/python"),
        ({"conda": "my env"}, "eval \"$(conda shell.bash hook)\"\nconda activate 'my env'"),
        (
            {"container": "nvcr.io#nvidia/pytorch:26.01"},
            "STEP=('--container-image=nvcr.io#nvidia/pytorch:26.01' --container-mounts={here}:{here},/run:/run,/hf:/hf "
            "--container-workdir={here})",
        ),
        (
            {"container": "apptainer:images/torch"},
            "INSIDE=(apptainer exec --nv --bind {here},/run,/hf --pwd {here} images/torch)",
        ),
        (
            {"container": "docker://nvcr.io/nvidia/pytorch"},
            "INSIDE=(apptainer exec --nv --bind {here},/run,/hf --pwd {here} docker://nvcr.io/nvidia/pytorch)",
        ),
    ],
)
def test_the_script_enters_the_environment_that_is_asked_for(asked, line, folder, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/hf")
    _, *lines = Request(**asked).environment("/run")
    assert "\n".join(lines) == f"REQUEUES=100\n{line}".format(here=folder)


def test_an_array_has_a_job_for_each_trial_of_a_sweep(folder, submitted, capsys):
    assert main(["submit", *TINY, "--array", "sweep.yaml"]) == 0
    run = folder / "my run"
    options, rest = options_and_rest((run / "submit.sbatch").read_text())
    assert "--array=0-3%3" in options and f"--output={run}/trial_%3a/slurm-%A.log" in options
    settings = [path.read_text() for path in sorted(run.glob("trial_*/trial.settings"))]
    assert settings == [
        f"train.seed={1000 + n}\noptimizer.kwargs.lr=0.25\nmethod.gamma={(0.5, 1)[n % 2]}\n" for n in range(4)
    ]
    # the script of the third trial, with a stand-in for what it runs
    said = subprocess.run(
        ["bash", "-c", f"run() {{ printf '%s\\n' \"$@\"; }}\n{rest}"],
        env={"SLURM_ARRAY_TASK_ID": "2"},
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    assert said[-4:] == [f"train.checkpoint_dir={run}/trial_002", *settings[2].split()]
    assert "Its 4 trials: squeue -j 12" in capsys.readouterr().out


def test_the_last_nodes_of_a_job_serve_the_model_and_the_others_train(folder, submitted, monkeypatch):
    tiny_gpt2().save_pretrained(folder / "model")
    char_tokenizer().save_pretrained(folder / "model")
    typed = ["grpo", "train.sampler.engine=vllm", "--model", "model", "--prompts", "made", "--reward", "made"]
    asks = "--nodes 2 --gpus-per-node 4 --vllm-nodes 1 --vllm-python /opt/vllm/bin/python --no-follow --out run"
    assert main(["submit", *typed, *asks.split()]) == 0
    script = folder / "run" / "submit.sbatch"
    assert "--nodes=3" in options_and_rest(script.read_text())[0]
    known = {"scontrol": "[ $2 = hostnames ] && seq -f 'n%g' 3 || echo NodeName=$4 NodeAddr=10.0.0.${4#n} x"}
    known["srun"] = 'case "$*" in *api_server*) echo "$*" >said.serves; sleep 9;; *) echo "$*" >said.trains;; esac'
    for name, what in known.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{what}\n")
        (folder / "bin" / name).chmod(0o755)
    for name, value in {"NNODES": 3, "JOB_NODELIST": "n[1-3]", "JOB_ID": 12, "GPUS_ON_NODE": 4}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    subprocess.run(["bash", str(script)], check=True, timeout=8)  # it does not wait for the server
    serves, trains = ((folder / f"said.{name}").read_text() for name in ("serves", "trains"))
    assert "--nodes=1 --nodelist=n3 env VLLM_SERVER_DEV_MODE=1" in serves
    assert "/opt/vllm/bin/python -m vllm.entrypoints.openai.api_server --model model" in serves
    assert "--host 0.0.0.0 --port 8000" in serves and "--tensor-parallel-size 4" in serves
    assert "--nodes=2 --nodelist=n1,n2" in trains and "--nnodes 2 --nproc-per-node 4" in trains
    assert "--rdzv-endpoint 10.0.0.1:" in trains and "train.sampler.url=[http://10.0.0.3:8000]" in trains


@pytest.mark.parametrize(
    "typed, said",
    [
        ([*TINY, "--dry-run", "--vllm-nodes", "1"], "train.sampler is not vllm in this config: add"),
        (TINY, "There is no sbatch here: use a machine of the cluster, or add --dry-run"),
        (["--follow-job", "12"], "There is no scontrol here: use a machine of the cluster"),
        ([*TINY, "--dry-run", "--time", "1h"], "--time is '1h': write minutes, hours:minutes:seconds or days-hours"),
        ([*TINY, "--dry-run", "--time", "5"], "--time 5 is 300 seconds, and the run is to save 300 seconds before"),
        ([*TINY, "--dry-run", "--nodes", "0"], "--nodes must be at least 1, got 0"),
        ([*TINY, "--dry-run", "--conda", "a", "--venv", "b"], "--conda and --venv name different environments"),
        ([*TINY, "--dry-run", "--venv", "b"], "--venv b has no bin/python"),
        ([*TINY, "--dry-run", "--processes", "2"], "--processes is for one machine: write --nodes and"),
        ([*TINY, "--dry-run", "--mdel", "x"], "No such option: --mdel"),
        ([*TINY, "--dry-run", "--samples", "made"], "The method learns from its own samples: leave out --samples"),
        (
            [*TINY, "--dry-run", "train.resume_from_checkpoint=there"],
            "train.resume_from_checkpoint is there, but a job goes on from the newest checkpoint of its own folder",
        ),
        (
            [*TINY, "--dry-run", "--array", "asha.yaml"],
            "asha.yaml has search_alg random and scheduler asha, which choose",
        ),
        ([*TINY, "--dry-run", "--array", "timed.yaml"], "timed.yaml has time_budget_s, which trials that are jobs"),
        ([*TINY, "--dry-run", "--array", "wrong.yaml"], "Unknown key 'method.gama'. Did you mean 'gamma'?"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_submitted(typed, said, folder, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (folder / "asha.yaml").write_text(SWEEP.replace("metric:", "scheduler: asha, metric:"))
    (folder / "timed.yaml").write_text(SWEEP.replace("metric:", "time_budget_s: 9, metric:"))
    (folder / "wrong.yaml").write_text(SWEEP.replace("gamma", "gama"))
    code, printed = failure(capsys, "submit", *typed)
    assert code == 2 and printed.startswith(f"trlx submit: {said}") and printed.count("\n") == 1
    assert not (folder / "my run").exists()


def test_a_folder_with_a_checkpoint_is_gone_on_with_only_if_that_is_asked_for(folder, capsys, monkeypatch):
    monkeypatch.setattr(
        submitting.checkpoint, "newest", lambda run: run / "checkpoint_4" if run.name == "trial_001" else None
    )
    typed = ["submit", *TINY, "--array", "sweep.yaml", "--dry-run"]
    code, printed = failure(capsys, *typed)
    assert code == 2 and f"There is a checkpoint {folder}/my run/trial_001/checkpoint_4: add --resume" in printed
    assert main([*typed, "--resume"]) == 0


@pytest.mark.parametrize(
    "time, seconds",
    [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("1-12", 129600), ("1-0:30", 88200), ("0-0:0:9", 9)],
)
def test_times_are_read_as_slurm_reads_them(time, seconds):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    "last, status",
    [
        ({"JobState": "COMPLETED", "ExitCode": "0:0"}, 0),
        ({"JobState": "FAILED", "ExitCode": "2:0"}, 2),
        ({"JobState": "CANCELLED", "ExitCode": "0:15"}, 1),
        (KeyboardInterrupt, 130),
    ],
)
def test_a_job_is_followed_through_its_starts_to_its_end(last, status, tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    states = [
        ("", {"JobState": "PENDING", "Reason": "Resources", "Restarts": "0", "StdOut": str(log)}),
        ("one\n", {"JobState": "RUNNING", "NodeList": "n1", "Restarts": "0"}),
        ("two\n", {"JobState": "PENDING", "Reason": "BeginTime", "Restarts": "1"}),
        ("end", last if last is KeyboardInterrupt else {**last, "Restarts": "1"}),
    ]

    def state_of(number):
        text, state = states.pop(0)
        assert number == "12"
        with log.open("a") as file:
            file.write(text)
        if state is KeyboardInterrupt:
            raise state
        return {"Reason": "None", "NodeList": "", **state}

    monkeypatch.setattr(following, "state_of", state_of)
    assert following.follow("12", poll_seconds=0) == status
    out, err = capsys.readouterr()
    assert out == ("one\ntwo\n" if last is KeyboardInterrupt else "one\ntwo\nend")
    assert err.startswith("Job 12: waits (Resources)\nJob 12: runs on n1\nJob 12: waits (BeginTime), start 2\n")
    ended = "\nJob 12 goes on. To see more of it: trlx submit --follow-job 12\n"
    assert err.endswith(ended if last is KeyboardInterrupt else f"Job 12: {last['JobState'].lower()}, start 2\n")
