"""Runs that stop, go on, go on with other settings, or start in a folder that holds a run."""

import pytest

from tests.runs import run
from trlx import checkpoint


def test_save_deletes_nothing_but_a_checkpoint(tmp_path):
    trainer = run("SFT", tmp_path / "run", train={"total_steps": 1})
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match="name a new folder"):
        trainer.save(tmp_path / "run")
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before
    for _ in range(2):  # a new folder, then the checkpoint there
        trainer.save(tmp_path / "saved")
    assert checkpoint.read_state(tmp_path / "saved")[0].step == 1
