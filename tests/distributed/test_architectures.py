"""Encoder-decoder models and adapters on two processes."""

import pytest

from tests.builders import tiny_gpt2_config
from tests.distributed.test_two_processes import CALM, GREEDY, close
from tests.processes import together
from tests.runs import metrics, run, weights
from tests.unit.test_seq2seq import run_of

pytestmark = pytest.mark.distributed

LORA = {"peft_config": {"peft_type": "LORA", "r": 4}}


def both(folder, fn, *args, **changes):
    method = {**GREEDY, "chunk_size": 8}
    together(1, fn, *args, folder / "one", optimizer=CALM, method=method, train={"batch_size": 6}, **changes)
    together(2, fn, *args, folder / "two", optimizer=CALM, method=GREEDY, train={"batch_size": 3}, **changes)
    close(weights(folder / "one"), weights(folder / "two"))
    assert len(metrics(folder / "one")) == len(metrics(folder / "two"))


def test_an_encoder_decoder_on_two_processes_equals_one_with_twice_the_batch(tmp_path):
    both(tmp_path, run_of, "bart", "PPO")


def test_an_adapter_on_two_processes_equals_one_with_twice_the_batch(tmp_path):
    both(tmp_path, run, "PPO", model={**LORA, "model_path": tiny_gpt2_config()})


def test_virtual_tokens_on_two_processes_equal_one_with_twice_the_batch(tmp_path):
    prompt = {"peft_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}}
    both(tmp_path, run, "PPO", model={**prompt, "model_path": tiny_gpt2_config()})
