"""Fixtures for all tests, and what the tests ask of their surroundings; the builders are plain functions in
`tests.builders`."""

from __future__ import annotations

import os
import random
import signal

# Tests depend on no variable of the shell they are started from. What is set here has to be set before the imports.
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_TERMINALS = ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "CI")
PREFIXES = ("ACCELERATE_", "FSDP_", "MLFLOW_", "SLURM_", "TORCHELASTIC_", "TRACKIO_", "TRLX_", "WANDB_")
for _name in [name for name in os.environ if name in (*OF_LAUNCHERS, *OF_TERMINALS) or name.startswith(PREFIXES)]:
    del os.environ[_name]
# No test reaches for the hub or a GPU. The processes that tests start share two cores, so each has one thread, as it
# would have under torchrun.
os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

from tests import builders  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="of torch, in this process; tests pass with any number")


def pytest_configure(config):
    # a shell ignores Ctrl-C for what it starts in the background, and tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(config.getoption("--threads"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return FewProcesses(config, log)


class FewProcesses(LoadScopeScheduling):
    """Tests that start processes run one after the other: those of Megatron in one worker, the others in the other
    worker, which then goes on with the rest. Those that share a cluster of SLURM run in one worker."""

    def _split_scope(self, nodeid):
        groups = ("tests/distributed/test_megatron", "tests/distributed/", "tests/slurm/")
        return next((group for group in groups if nodeid.startswith(group)), nodeid)


@pytest.fixture(autouse=True)
def _same_randomness_in_every_test():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tokenizer():
    """A character tokenizer with <pad> 0, <s> 1, </s> 2; "a" is 4."""
    return builders.char_tokenizer()


@pytest.fixture
def model():
    """A tiny random GPT-2 over the characters of `tokenizer`."""
    return builders.tiny_gpt2()
