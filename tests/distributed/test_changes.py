"""A run goes on with another number of processes or another precision; what stops it stops it on every process."""

import json
import os

import pytest

from tests.processes import together
from tests.runs import metrics, run
from trlx import checkpoint
from trlx.data.store import RolloutStore
from trlx.run.folder import locked
from trlx.trainer import schedule

pytestmark = pytest.mark.distributed

AUTO = {"resume_from_checkpoint": "auto"}


def read_backwards(folder, **train):
    """SFT on eight texts, each pass from the last to the first; every process writes down the rows that it reads."""
    rows, read = RolloutStore.rows, []
    RolloutStore.rows = lambda store, index: (read.append(list(index)), rows(store, index))[1]
    schedule.pass_order = lambda num_rows, seed, number, together: tuple(range(num_rows))[::-1]
    run("SFT", folder, train={**train, **AUTO})
    (folder / f"read_{os.environ.get('RANK', 'alone')}.json").write_text(json.dumps(read))


def position(folder):
    state = checkpoint.read_state(checkpoint.newest(folder))[0]["schedule"]
    return tuple(state[name] for name in ("epoch", "inner_epoch", "passes", "rows_done"))


def test_another_number_of_processes_goes_on_at_the_next_row(tmp_path):
    together(1, read_backwards, tmp_path, batch_size=2, total_steps=1)
    together(2, read_backwards, tmp_path, batch_size=2, total_steps=4)
    read = {name: json.loads((tmp_path / f"read_{name}.json").read_text()) for name in ("alone", "0", "1")}
    assert read == {"alone": [[7, 6]], "0": [[5, 4], [1], [7, 6]], "1": [[3, 2], [0], [5, 4]]}
    assert position(tmp_path) == (1, 0, 1, 4)


def test_ppo_goes_on_with_other_processes_and_in_another_precision(tmp_path):
    # two passes over eight rollouts: rows 0-1 | 2-5, 6-7 | the second pass, and two of the next collection
    together(1, run, "PPO", tmp_path, train={"batch_size": 2, "total_steps": 1})
    together(2, run, "PPO", tmp_path, train={"batch_size": 2, "total_steps": 3, **AUTO})
    assert position(tmp_path) == (0, 1, 1, 0)
    together(1, run, "PPO", tmp_path, train={"batch_size": 8, "total_steps": 6, "mixed_precision": "bf16", **AUTO})
    assert position(tmp_path) == (2, 0, 4, 0)
    steps = [line for line in metrics(tmp_path) if "grad_norm" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in steps if "policy/kl" in line] == [1, 5]


def refused(folder, wanted, told):
    """Every process of a run hears why it cannot start."""
    with pytest.raises((RuntimeError, ValueError), match=told):
        run("SFT", folder, train={"resume_from_checkpoint": wanted})


def start_in_bad_places(folder):
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "file").write_text("")
    refused(folder / "taken", None, "is written into by another run, process")
    refused(folder / "free", str(folder / "other"), "holds no checkpoint")
    run("SFT", folder / "free", train={"total_steps": 1})


def test_a_run_that_cannot_start_ends_on_every_process(tmp_path):
    (tmp_path / "taken").mkdir()
    with locked(tmp_path / "taken"):
        together(2, start_in_bad_places, tmp_path)
    assert checkpoint.newest(tmp_path / "free") is not None
