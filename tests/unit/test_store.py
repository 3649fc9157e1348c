import torch

from trlx.batch import Rollout
from trlx.data.collate import EncoderDecoderRows, collate
from trlx.data.store import RolloutStore, pass_order, permutation, shard

ROLLOUTS = [Rollout([7], [10 + i] * (i + 1), score=float(i)) for i in range(5)]


def test_a_batch_is_as_wide_as_its_longest_row():
    store = RolloutStore(ROLLOUTS, pad_id=0)
    assert len(store) == 5
    assert store.rows([0, 1]).tokens.tolist() == [[7, 10, 0], [7, 11, 11]]


def test_rows_are_found_by_slice_list_and_tensor():
    store = RolloutStore(ROLLOUTS, pad_id=0)
    for index in (slice(1, 5, 2), [1, 3], torch.tensor([1, 3]), torch.tensor([False, True, False, True, False])):
        assert store.rows(index).scores.sum(dim=1).tolist() == [1.0, 3.0]


def test_a_token_batch_is_a_store_and_gives_the_same_rows():
    batch, store = collate(ROLLOUTS, pad_id=0), RolloutStore(ROLLOUTS, pad_id=0)
    for name, column in store.rows([2, 0]).columns().items():
        assert torch.equal(column, batch.rows([2, 0]).columns()[name])
    # prompts of one token, responses of three and of one
    assert store.num_tokens([2, 0]) == batch.num_tokens([2, 0]) == 6
    # with an encoder prompts are another row; the start token of each of the decoder's does not count
    assert EncoderDecoderRows(0, "<sep>").collate(ROLLOUTS, pad_id=0).num_tokens([2, 0]) == 6


def test_the_digest_tells_other_tokens_and_scores_apart():
    digests = {
        RolloutStore([Rollout([7], [3], score=s, trained=t)], 0).digest() for s in (0.0, 1.0) for t in (None, [True])
    }
    assert len(digests) == 4
    assert RolloutStore(ROLLOUTS, 0).digest() == RolloutStore(list(ROLLOUTS), 0).digest()


def test_the_order_follows_from_seed_and_number_alone():
    torch.manual_seed(0)
    before = pass_order(20, seed=1, number=2)
    assert sorted(before) == list(range(20)) and before != tuple(range(20))
    permutation.cache_clear()
    torch.manual_seed(1)
    assert pass_order(20, seed=1, number=2) == before
    assert pass_order(20, seed=1, number=3) != before
    assert pass_order(20, seed=2, number=2) != before


def test_drawing_an_order_leaves_the_global_generator_alone():
    permutation.cache_clear()
    state = torch.get_rng_state()
    pass_order(20, seed=1, number=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_processes_together_see_the_batch_that_one_sees():
    store = RolloutStore(ROLLOUTS, pad_id=0)
    whole = shard(store, [4, 1, 3, 0], rank=0, size=1)
    parts = [shard(store, [4, 1, 3, 0], rank, size=2) for rank in range(2)]
    assert whole.scores.sum(dim=1).tolist() == [4.0, 1.0, 3.0, 0.0]
    for name, column in whole.columns().items():
        rows = [row.tolist() for part in parts for row in part.columns()[name]]
        if name == "group":
            assert rows == column.tolist()
            continue
        # each part is only as wide as its own rows
        assert rows == [row[: len(mine)].tolist() for row, mine in zip(column, rows, strict=True)]


def test_every_process_gets_the_same_number_of_rows_and_the_made_up_ones_count_nothing():
    store = collate(ROLLOUTS, pad_id=0)
    parts = [shard(store, [4, 1, 3, 0, 2], rank, size=4) for rank in range(4)]
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    assert [part.response_mask.any(dim=1).tolist() for part in parts] == [
        [True] * 2,
        [True] * 2,
        [True, False],
        [False] * 2,
    ]
    assert parts[2].tokens[:, 1].tolist() == [12, 14]
    assert sum(int(part.response_mask.sum()) for part in parts) == int(store.response_mask.sum()) == 15
    assert store.response_mask.any(dim=1).all()
