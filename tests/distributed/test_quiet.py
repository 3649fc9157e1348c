"""What a run writes to stderr are its own lines: other packages warn of nothing that a user could not change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import Job
from tests.runs import run

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SHORT = {"total_steps": 1, "save_best": False}
TENSOR = {"trainer": "NeMoPPOTrainer", "trainer_kwargs": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
LORA = {"peft_type": "LORA", "r": 2, "bias": "all"}


def runs(folder: str) -> None:
    """PPO on both backends; the second run trains as much as can be trained beside an adapter."""
    run("PPO", f"{folder}/tensor", train={**SHORT, **TENSOR})
    adapted = {"train": {**SHORT, "gradient_checkpointing": True}, "model": {"peft_config": LORA}}
    run("PPO", f"{folder}/lora", method={"num_value_layers_unfrozen": 1}, **adapted)


def test_no_package_beneath_warns_in_a_run(tmp_path):
    # processes of their own: those of tests.processes have imported everything before
    job, code = Job(), f"from tests.distributed.test_quiet import runs; runs({str(tmp_path)!r})"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **job.environment(rank, 2), "TRLX_VERBOSITY": "error"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert [rank.communicate(timeout=120)[1] for rank in ranks] == ["", ""]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
