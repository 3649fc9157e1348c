"""Replay: a step of a run computed again, and what it says where something differs."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.runs import run, tiny_config
from trlx.launch.cli import main
from trlx.launch.replay import ASKED, FOUND, Replay, recorded_command, replay
from trlx.run.steps import digest

SETTINGS = {"total_steps": 6, "checkpoint_interval": 2, "eval_interval": 3, "record_steps": [3, 5]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run"
    run("PPO", folder, train=SETTINGS)
    return folder


def again(recorded, folder, monkeypatch, step=5, **changes):
    """What a process says that `trlx replay` starts."""
    asked = {"run": str(recorded), "step": step, "folder": str(folder)}
    monkeypatch.setenv(ASKED, json.dumps(asked))
    with pytest.raises(SystemExit) as end:
        run("PPO", recorded, train=SETTINGS, **changes)
    assert end.value.code == 0
    return json.loads((folder / FOUND).read_text())


def changed(folder, copy, name, change):
    """A copy of a run whose file `name` has a line changed."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != name:
            (copy / path.name).symlink_to(path)
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    for line in lines:
        change(line)
    (copy / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


def test_a_step_that_is_computed_again_agrees_bit_by_bit(recorded, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in recorded.rglob("*") if path.name != ".lock"}
    (differ, numbers), (others, tensors) = again(recorded, tmp_path, monkeypatch)
    assert (differ, others) == (False, False)
    assert numbers.startswith("numbers: all ") and numbers.endswith(" agree, of steps 5")  # checkpoint_4 is before it
    assert tensors.startswith("tensors: all ") and tensors.endswith(" agree, of steps 5")
    (line,) = [json.loads(line) for line in (tmp_path / "digests.jsonl").read_text().splitlines()]
    kinds = list(dict.fromkeys(name.split(".")[0].split("[")[0] for name in line["tensors"]))
    assert kinds == ["batch", "outputs", "loss", "gradient", "weight"]
    assert before == {path: path.stat().st_mtime_ns for path in recorded.rglob("*") if path.name != ".lock"}


def test_the_first_tensor_that_differs_is_named(recorded, tmp_path, monkeypatch):
    # another learning rate changes what the step does to the weights, and nothing before that
    (_, numbers), (differ, tensors) = again(recorded, tmp_path, monkeypatch, optimizer={"kwargs": {"lr": 1e-3}})
    assert differ and tensors.startswith("tensors: weight.") and " of step 5 differs: sum " in tensors
    assert "learning_rate_group_0 of step 5 differs: 0.00" in numbers


def test_numbers_and_tensors_are_compared_within_a_tolerance(recorded, tmp_path):
    def other(line):
        line |= {"losses/value_loss": line.get("losses/value_loss", 0.0) + 1e-4, "time/step": 7.0}
        if "tensors" in line:
            name = next(iter(line["tensors"]))
            line["tensors"][name] = ["", line["tensors"][name][1], line["tensors"][name][2] * 1.001]

    for name, kind in (("metrics.jsonl", 0), ("digests.jsonl", 1)):
        copy = changed(recorded, tmp_path / name, name, other)
        exact, near = (list(Replay(str(recorded), 5, str(copy), tolerance).differences()) for tolerance in (0.0, 1e-2))
        assert [differ for differ, _ in exact] == [kind == 0, kind == 1]
        assert [differ for differ, _ in near] == [False, False]
    assert exact[1][1].startswith("tensors: batch.tokens of step 5 differs: sum ")
    bare = changed(recorded, tmp_path / "bare", "digests.jsonl", lambda line: line.update(step=99))
    assert list(Replay(str(bare), 5, str(bare)).differences())[1] == (
        False,
        "tensors: none were recorded (train.record_steps)",
    )


def test_a_digest_is_hash_sum_and_norm():
    import torch

    assert digest(torch.tensor([3.0, 4.0]))[1:] == [7.0, 5.0]
    assert digest(torch.tensor([3.0, 4.0])) == digest(torch.tensor([[9.0, 3.0], [9.0, 4.0]])[:, 1])
    assert digest(torch.tensor([3.0, 4.0]))[0] != digest(torch.tensor([4.0, 3.0]))[0]
    assert digest(torch.zeros(0, dtype=torch.bfloat16))[1:] == [0.0, 0.0]


def test_a_command_of_another_run_is_refused(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv(ASKED, json.dumps({"run": str(recorded), "step": 5, "folder": str(tmp_path)}))
    with pytest.raises(ValueError, match="write the run's own command after --"):
        run("PPO", tmp_path / "another")
    # a replay is no part of the run: it writes, and tells, nothing outside its folder
    outside = dict.fromkeys(("logging_dir", "rollout_logging_dir", "tracker", "push_to_hub"), "wandb")
    asked = Replay(str(recorded), 4, str(tmp_path))
    train = asked.config(tiny_config(recorded, "PPO", train=outside)).train
    assert (train.checkpoint_dir, {getattr(train, name) for name in outside}) == (str(tmp_path), {None})
    assert train.resume_from_checkpoint == str(recorded / "checkpoint_2")  # checkpoint_4 is of the step itself


def test_the_command_says_what_its_process_found(recorded, capfd):
    writes = "import json, os, sys; a = json.loads(os.environ['{}']); open(a['folder'] + '/{}', 'w').write({!r})"
    for found, status in (([[False, "fine"]], 0), ([[False, "fine"], [True, "odd"]], 1)):
        words = [sys.executable, "-c", writes.format(ASKED, FOUND, json.dumps(found))]
        assert main(["replay", str(recorded), "--step", "5", "--", *words]) == status
        out = capfd.readouterr().out.splitlines()
        assert out == [
            f"Steps 5 to 5 again, from {recorded / 'checkpoint_4'}: {shlex.join(words)}",
            *(text for _, text in found),
        ]
    with pytest.raises(ChildProcessError, match="ended with code 3 and did not train"):
        replay(recorded, 1, [sys.executable, "-c", "raise SystemExit(3)"])
    assert "from the beginning: " in capfd.readouterr().out
    with pytest.raises(ValueError, match="has no step 7: its last one is 6"):
        replay(recorded, 7, [])
    with pytest.raises(FileNotFoundError, match="There is no config.json"):
        replay(recorded.parent, 7, [])


@pytest.mark.parametrize(
    ("command", "processes", "words"),
    [
        ("python /somewhere/bin/trlx ppo --model tiny", "1", ["-m", "trlx", "ppo", "--model", "tiny"]),
        ("python /x/trlx/__main__.py sft", "2", ["-m", "trlx", "sft", "--processes", "2"]),
        (f"python {__file__} a=1", "1", [__file__, "a=1"]),
        (f"python {__file__}", "2", None),
        ("python -c", "1", None),
    ],
)
def test_a_run_says_how_it_was_started(tmp_path, command, processes, words):
    (tmp_path / "environment.jsonl").write_text(json.dumps({"command": command, "processes": processes}) + "\n")
    if words is None:
        with pytest.raises(ValueError, match="write its command after --"):
            recorded_command(tmp_path)
    else:
        assert recorded_command(tmp_path) == [sys.executable, *words]
    with pytest.raises(ValueError, match="is not known"):
        recorded_command(Path(tmp_path / "nothing"))
