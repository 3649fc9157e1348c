"""Parallel sizes are checked against the model and the processes before the model is built."""

import dataclasses
from types import SimpleNamespace

import pytest

from tests.unit.megatron_configs import SMALL, model, read
from trlx.backends.megatron.settings import ParallelSizes, Recompute
from trlx.backends.megatron.size_checks import check_sizes
from trlx.batch import Rollout
from trlx.data.collate import collate
from trlx.strict import ConfigError
from trlx.trainer.nemo import megatron_backend


def check(vocab_size=None, sizes=(1, 1, None, False), batch_size=8, world_size=8, trainer=None, **changes):
    """Checks parallel sizes for a model of 8 layers with 8 heads."""
    settings = dataclasses.replace(
        read({**model(**SMALL, num_query_groups=4), "trainer": trainer or {}}),
        sizes=ParallelSizes(*sizes),
        **changes,
    )
    decoder = dataclasses.replace(settings.decoder, vocab_size=vocab_size)
    check_sizes(settings, decoder, world_size, batch_size)


@pytest.mark.parametrize("sizes", [(1, 1, None, False), (4, 2, None, True), (2, 2, 4, True), (1, 8, None, False)])
def test_sizes_that_divide_everything_pass(sizes):
    check(sizes=sizes, micro_batch_size=2, vocab_size=100)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sizes": (3, 1, None, False), "world_size": 3},
            "num_attention_heads 8 is not a multiple of tensor_model_p",
        ),
        ({"sizes": (8, 1, None, False)}, "num_query_groups 4 is not a multiple of .* 8: write one of 1, 2, 4"),
        (
            {"sizes": (3, 1, None, False), "world_size": 3},
            "ffn_hidden_size 256 is not a multiple of .* 3: write one",
        ),
        (
            {"sizes": (1, 3, None, False), "world_size": 3},
            "num_layers 8 is not a multiple of pipeline.* 3: write one",
        ),
        ({"sizes": (1, 2, 3, False)}, "num_layers 8 is not a multiple of pipeline.* x virtual.* 6"),
        (
            {"sizes": (1, 1, 2, False)},
            "virtual_pipeline_model_parallel_size 2 needs pipeline_model_parallel_size 2 or",
        ),
        ({"sizes": (1, 1, None, True)}, "sequence_parallel needs tensor_model_parallel_size 2 or more"),
        (
            {"sizes": (2, 2, None, False), "world_size": 6},
            "2 x .* 2 = 4 processes .* 6 were started: start a multip",
        ),
        ({"micro_batch_size": 3}, r"3 rows per microbatch \(train.minibatch_size.*\) do not divide train.batch_size 8"),
        (
            {"sizes": (1, 2, 2, False), "micro_batch_size": 8},
            "8 / 8 rows .* = 1 microbatches, not a multiple of .* 2",
        ),
        (
            {"recompute": Recompute("full", "block", 5), "sizes": (1, 2, None, False)},
            "num_layers is 5, .* has 4 layers",
        ),
        (
            {"trainer": {"devices": 8, "num_nodes": 4}},
            "8 x trainer.num_nodes 4 = 32 processes, but 8 were started.* torchrun --nnodes 4 --nproc-per-node 8",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_explained(changes, words):
    with pytest.raises(ValueError, match=words):
        check(**changes)


def test_all_that_does_not_fit_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        check(sizes=(3, 3, None, False), micro_batch_size=5)
    assert len(str(caught.value).splitlines()) == 6


def test_devices_left_to_the_launcher_are_not_compared():
    check(trainer={"devices": "auto", "num_nodes": 4})
    check(trainer={"devices": 2})


def test_interleaved_stages_get_microbatches_of_whole_pairs_that_count_nothing():
    # six rows in microbatches of four, over three stages: one microbatch is missing
    parallel = SimpleNamespace(sizes=ParallelSizes(1, 3, 2, False))
    backend = SimpleNamespace(microbatch_size=4, divisor=1, multiple=3, device="cpu", parallel=parallel)
    batch = collate([Rollout([1], [2, 3]) for _ in range(6)], 0)
    found = megatron_backend()._microbatches(backend, batch, [[0, 1, 2, 3], [4, 5]])
    assert [len(rows) for rows in found] == [4, 2, 2]
    assert [int(rows.response_mask.sum()) for rows in found] == [8, 4, 0]
