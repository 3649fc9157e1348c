"""What `trlx plan` says a process holds and sends is what it does hold and send."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers as hf

from benchmarks.megatron_memory import Case, measure
from tests.builders import VOCABULARY, tiny_gpt2_config
from tests.processes import together

pytestmark = pytest.mark.distributed

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
    pad_token_id=None,
)
GPT2 = tiny_gpt2_config(layers=4, hidden=64, n_head=4)  # tied, learned positions, biases
LLAMA = hf.LlamaConfig(**SIZES, tie_word_embeddings=False)
QWEN3 = hf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)
NEOX = hf.GPTNeoXConfig(**{**SIZES, "num_key_value_heads": None})
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SEQUENCE, CHUNKS = {"sequence_parallel": True}, {"virtual_pipeline_model_parallel_size": 2}
FULL = {"granularity": "full", "method": "uniform", "num_layers": 1}

EXACT = ("parameters", "weights", "gradients", "moments", "main weights", "reference", "messages")

ON_ONE = [
    Case(GPT2),
    Case(GPT2, algorithm="ILQL"),
    Case(GPT2, algorithm="PPO", precision="bf16"),
    Case(GPT2, algorithm="PPO", unfrozen=2),
    Case(GPT2, algorithm="PPO", unfrozen=2, recompute=FULL),
    Case(GPT2, algorithm="PPO", unfrozen=2, recompute={**FULL, "num_layers": 2}),
    Case(GPT2, algorithm="PPO", unfrozen=3, recompute={**FULL, "method": "block", "num_layers": 2}),
    Case(GPT2, recompute={"granularity": "selective"}),
    Case(GPT2, recompute=FULL),
    Case(GPT2, recompute={**FULL, "num_layers": 2}),
    Case(GPT2, recompute={**FULL, "method": "block", "num_layers": 2}),
    Case(NEOX),
    Case(LLAMA),
    Case(LLAMA, algorithm="Reward"),
    Case(GPT2, algorithm="Reward", precision="bf16"),
    Case(QWEN3, algorithm="PPO"),
]
FROZEN = [
    Case(GPT2, PIPELINE, "PPO", unfrozen=2),
    Case(GPT2, TENSOR | PIPELINE, "PPO", unfrozen=1),
    Case(GPT2, {"pipeline_model_parallel_size": 4}, "PPO", unfrozen=1),
    Case(GPT2, TENSOR | PIPELINE | SEQUENCE, "PPO", unfrozen=3),
    Case(GPT2, PIPELINE | CHUNKS, "PPO", unfrozen=1),
    Case(GPT2, PIPELINE | CHUNKS, "PPO", unfrozen=3),
]
ON_FOUR = [
    Case(GPT2, TENSOR, "ILQL"),
    Case(GPT2, TENSOR | SEQUENCE, "PPO"),
    Case(GPT2, TENSOR | SEQUENCE, recompute=FULL),
    Case(GPT2, PIPELINE | CHUNKS),
    Case(GPT2, TENSOR | PIPELINE, "PPO"),
    Case(GPT2, TENSOR | PIPELINE, "PPO", unfrozen=0),
    Case(GPT2, TENSOR | PIPELINE, "ILQL", unfrozen=0),
    Case(LLAMA, TENSOR | PIPELINE | SEQUENCE, "ILQL"),
    Case(LLAMA, {"pipeline_model_parallel_size": 4}, "PPO"),
    Case(QWEN3, TENSOR | SEQUENCE),
    Case(GPT2, TENSOR | PIPELINE | SEQUENCE, "Reward"),
    Case(LLAMA, TENSOR | PIPELINE, "Reward", unfrozen=0),
    Case(LLAMA, PIPELINE | CHUNKS, "Reward", unfrozen=1),
    Case(QWEN3, TENSOR | PIPELINE),
]


def composed_norms(case: Case) -> int:
    """Bytes that a CPU keeps beside: without a fused kernel an RMSNorm keeps the float32 it multiplies its weight with.

    On one process and in float32: of two norms a layer and the last one, and of queries and keys in Qwen3.
    """
    if case.model in (GPT2, NEOX):
        return 0
    widths = (2 * 4 + 1) * 64 + (4 * (64 + 32) if case.model is QWEN3 else 0)
    return case.rows * case.length * 4 * widths


def check_step(cases: list[Case], in_flight: bool = False) -> None:
    for case in cases:
        found = measure(case)
        for name in EXACT:
            measured, on_paper = found[name]
            assert measured == on_paper, (case, name, measured, on_paper)
        if in_flight:
            measured, on_paper = found["activations"]
            assert 0 <= measured - on_paper <= 0.01 * on_paper, (case, measured, on_paper)


def check_distributed_optimizer(case: Case) -> None:
    """A data rank's part is a half, filled up so that weights begin at multiples of 64 and parts of 128 numbers."""
    found = measure(case)
    gradients, moments = found["gradients"], found["moments"]
    assert 0 <= gradients[0] - gradients[1] < 4 * 64 * 60  # 54 weights
    assert abs(moments[0] - moments[1]) <= gradients[0] - gradients[1]
    (sent, on_paper), filling = found["messages"], gradients[0] - gradients[1]
    assert sent["data", "reduce_scatter"] - on_paper["data", "reduce_scatter"] == filling
    assert sent["data", "all_gather"] - on_paper["data", "all_gather"] == filling
    assert sent["tensor", "all_reduce"] == on_paper["tensor", "all_reduce"]


def check_layouts() -> None:
    check_step(ON_FOUR)
    check_distributed_optimizer(Case(GPT2, TENSOR, "PPO", optimizer="distributed_fused_adam"))
    layouts = (PIPELINE, PIPELINE | CHUNKS, TENSOR | PIPELINE | SEQUENCE, {"pipeline_model_parallel_size": 4})
    check_step([*(Case(GPT2, layout, "PPO") for layout in layouts), *FROZEN], in_flight=True)


def check_activations() -> None:
    for case in ON_ONE:
        measured, on_paper = measure(case)["activations"]
        on_paper += composed_norms(case)
        # tables of angles, masks and token ids are not counted; a reward model keeps a little less at its last tokens
        least = -0.003 * on_paper if case.algorithm == "Reward" else 0
        assert least <= measured - on_paper <= 0.02 * on_paper, (case, measured, on_paper)


def check_one() -> None:
    check_step([replace(case, layout={}) for case in ON_ONE])
    check_activations()


def test_one_process_holds_what_is_on_paper():
    together(1, check_one)


def test_every_process_of_a_layout_holds_and_sends_what_is_on_paper():
    together(4, check_layouts)
