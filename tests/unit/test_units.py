"""A loss is a mean over its units in the whole global batch: every split of it gives the gradient worked by hand."""

import pytest
import torch

from tests.builders import char_tokenizer
from tests.runs import tiny_config
from trlx.backends.accelerate import AccelerateBackend
from trlx.backends.base import ModelNeeds
from trlx.batch import Rollout
from trlx.data.collate import RowFormat
from trlx.data.store import RolloutStore, shard
from trlx.methods.masked import mean_of
from trlx.methods.units import Unit

LENGTHS = [1, 3, 2, 2]
"""Response tokens of row i, whose score is i + 1: 1, 2, 3, 4."""


def backend(folder):
    """A value head is all that trains. By plain SGD with a learning rate of 1, a step is minus the gradient."""
    changes = {"optimizer": {"name": "sgd", "kwargs": {"lr": 1.0}}, "scheduler": {"name": "constant", "kwargs": {}}}
    config = tiny_config(folder, "SFT", model={"num_layers_unfrozen": 0}, train={"max_grad_norm": None}, **changes)
    needs = ModelNeeds(value_head=True, dropout=False)
    sections = {"model": config.model, "optimizer": config.optimizer, "scheduler": config.scheduler}
    return AccelerateBackend(**sections, train=config.train, tokenizer=char_tokenizer(), needs=needs)


def rows(lengths=LENGTHS):
    """Row i has this many response tokens."""
    rollouts = [Rollout([4], [5] * length, score=float(i + 1)) for i, length in enumerate(lengths)]
    return RolloutStore(rollouts, 0, RowFormat())


def loss_of(unit):
    """A sum over units. Where every value is 1, its derivative by all values together is as each line says."""

    def loss(outputs, batch):
        counts, scores = batch.response_mask.any(dim=1), batch.scores.sum(dim=1)
        means = outputs.values.sum(dim=1) / batch.response_mask.sum(dim=1).clamp(min=1)
        if unit is Unit.TOKEN:  # the row's score for each token
            each = (outputs.values * scores[:, None])[batch.response_mask]
        elif unit is Unit.SEQUENCE:  # the row's score
            each = (means * scores)[counts]
        else:  # twice the score of the pair's first row
            each = (means[0::2] * means[1::2] * scores[0::2])[counts[0::2]]
        return each.sum(), {"loss": mean_of(each)}

    return loss


def gradient(backend, batch, unit):
    """By the bias of the value head, where every value is 1; and the metric, which is of the same units."""
    last = backend.policy.value_head.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(1.0)
    metrics = backend.train_step(batch, loss_of(unit), unit)
    return 1.0 - last.bias.item(), metrics["loss"]


EXPECTED = {
    Unit.TOKEN: (1 * 1 + 3 * 2 + 2 * 3 + 2 * 4) / 8,
    Unit.SEQUENCE: (1 + 2 + 3 + 4) / 4,
    Unit.PAIR: (2 * 1 + 2 * 3) / 2,
}
EXPECTED_OF_TWO = {Unit.TOKEN: (1 * 1 + 3 * 2) / 4, Unit.SEQUENCE: (1 + 2) / 2, Unit.PAIR: 2 * 1 / 1}
"""Where only the first two rows count."""


@pytest.mark.parametrize("unit", Unit)
def test_a_gradient_is_the_mean_over_the_units_of_the_batch_however_it_is_split(tmp_path, unit):
    one = backend(tmp_path)
    whole = rows().rows([0, 1, 2, 3])
    mask = whole.response_mask & torch.tensor([[True], [True], [False], [False]])
    filled = whole.replace(response_mask=mask)
    for one.microbatch_size in [size for size in (1, 2, 4) if size % unit.rows == 0]:
        for batch, expected in ((whole, EXPECTED[unit]), (filled, EXPECTED_OF_TWO[unit])):
            found, loss = gradient(one, batch, unit)
            assert found == pytest.approx(expected, abs=1e-5)
            assert loss == pytest.approx(expected / unit.rows, abs=1e-5)


LENGTHS_OF_SIX = [*LENGTHS, 1, 1]
EXPECTED_OF_SIX = {
    Unit.TOKEN: (1 * 1 + 3 * 2 + 2 * 3 + 2 * 4 + 1 * 5 + 1 * 6) / 10,
    Unit.SEQUENCE: (1 + 2 + 3 + 4 + 5 + 6) / 6,
    Unit.PAIR: (2 * 1 + 2 * 3 + 2 * 5) / 3,
}


def gradients_of_six(folder):
    """By unit, of this process's share of six rows: of two processes the second one has rows that only fill up."""
    own = backend(folder)
    own.microbatch_size = 2
    store = rows(LENGTHS_OF_SIX)
    shares = {unit: shard(store, list(range(6)), own.data_rank, own.data_size, unit.rows) for unit in Unit}
    return {unit: gradient(own, share, unit) for unit, share in shares.items()}


def test_a_step_that_fails_leaves_no_gradients_to_the_next_one(tmp_path):
    one, batch, seen = backend(tmp_path), rows().rows([0, 1, 2, 3]), []
    one.microbatch_size = 2

    def failing(outputs, microbatch):
        seen.append(microbatch)
        if len(seen) == 2:
            raise MemoryError
        return loss_of(Unit.TOKEN)(outputs, microbatch)

    with pytest.raises(MemoryError):
        one.train_step(batch, failing)
    assert gradient(one, batch, Unit.TOKEN)[0] == pytest.approx(EXPECTED[Unit.TOKEN], abs=1e-5)
