"""On the Megatron backend the output of frozen layers is kept: they read each row once, and nothing else changes."""

from __future__ import annotations

import pytest

from tests.distributed.test_megatron_engine import RECOMPUTE, built, same
from tests.distributed.test_megatron_truth import LOSSES, ROWS, layout, rows
from tests.processes import together
from trlx.data.store import shard

pytestmark = pytest.mark.distributed


def used(backend):
    """What a collection and two passes over it compute: (metrics, weights), and the rows that each layer reads."""
    read = {}
    for chunk in backend.stage:
        for number, layer in enumerate(chunk.decoder.layers, start=chunk.first_layer):
            read[number] = 0
            layer.register_forward_pre_hook(_counting(read, number), with_kwargs=True)
    mine = shard(rows(), list(range(ROWS)), backend.data_rank, backend.data_size)
    policy, reference = backend.evaluate(mine), backend.evaluate(mine, reference=True)
    batch = mine.replace(old_logprobs=policy.logprobs, ref_logprobs=reference.logprobs)
    metrics = [backend.train_step(batch, LOSSES["PPO"]) for _ in range(2)]
    numbers = [{name: value for name, value in each.items() if not name.startswith("time/")} for each in metrics]
    found = {weight.name: weight.value.detach().clone() for weight in backend.weights.weights}
    found |= {"log-probabilities": policy.logprobs, "values": policy.values, "reference": reference.logprobs}
    return (numbers, found), read


def _counting(read, number):
    def count(module, args, kwargs):
        read[number] += kwargs["hidden_states"].shape[1]

    return count


def check(layouts, unfrozen, gpt=None) -> None:
    for parallel in layouts:
        for top in unfrozen:
            options = {"unfrozen": top, "gpt": gpt}
            whole, all_read = used(built("PPO", parallel, train={"cache_hidden_states": "off"}, **options))
            backend = built("PPO", parallel, **options)
            found, read = used(backend)
            same(found, whole)
            mine = ROWS // backend.data_size
            expected = {number: mine if number < 4 - top else count for number, count in all_read.items()}
            assert read == expected and set(all_read.values()) <= {4 * mine, 6 * mine}, (parallel, top, read)
            backend.forget_rows()
            backend.evaluate(rows())
            assert sum(read.values()) == sum(expected.values()) + ROWS * len(read)


def check_short_of_memory(parallel) -> None:
    """Microbatches with a row that is not kept run whole each time."""
    whole, _ = used(built("PPO", parallel, unfrozen=1, train={"cache_hidden_states": "off"}))
    backend = built("PPO", parallel, unfrozen=1, train={"cache_hidden_states": 30 * 32 * 4})
    found, read = used(backend)
    same(found, whole)
    kept = len(backend.trunk.room)
    assert 2 < kept < 7 and all(ROWS < count < 4 * ROWS for number, count in read.items() if number < 3), read


def check_left_whole() -> None:
    """Where frozen layers drop something out, where nothing is frozen below, and with interleaved stages."""
    assert built("SFT", layout(1, 2), unfrozen=1).trunk is not None
    assert built("SFT", layout(1, 2), unfrozen=1, dropout=True).trunk is None
    assert built("SFT", layout(1, 2, virtual=2), unfrozen=1).trunk is None
    assert built("SFT", layout(1, 2), unfrozen=4).trunk is None and built("SFT", layout(1, 2)).trunk is None


def test_frozen_layers_read_each_row_once_in_one_process():
    together(1, check, [layout()], [0, 1, 3], None)
    together(1, check, [layout()], [1], RECOMPUTE[1])
    together(1, check_short_of_memory, layout())


def test_so_they_do_on_two_and_four():
    together(2, check, [layout(1, 2)], [0, 1, 2, 3])
    together(2, check, [layout(2), layout(2, sequence=True)], [0, 3])
    together(2, check_short_of_memory, layout(1, 2))
    together(2, check_left_whole)
    together(4, check, [layout(1, 4)], [1, 2])
    together(4, check, [layout(2, 2, sequence=True)], [1])
