"""Fixtures for all tests; the builders behind them are plain functions in `tests.builders`."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests import builders


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
