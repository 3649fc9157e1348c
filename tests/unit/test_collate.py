import pytest
import torch

from trlx.batch import Rollout, TokenBatch
from trlx.data.collate import collate, left_pad, right_pad


def test_a_scalar_score_lands_on_the_last_response_token():
    batch = collate([Rollout([7, 8], [3, 4], score=5.0), Rollout([7], [3], score=1.0)], pad_id=0)
    assert batch.scores.tolist() == [[0, 0, 0, 5.0], [0, 1.0, 0, 0]]


def test_rows_are_prompt_response_padding_and_masks_come_from_lengths():
    batch = collate([Rollout([7, 8], [3, 2]), Rollout([7], [2])], pad_id=2)
    assert batch.tokens.tolist() == [[7, 8, 3, 2], [7, 2, 2, 2]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.response_mask.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_columns_have_the_types_that_batch_promises():
    batch = collate([Rollout([7], [3], score=1)], pad_id=0)
    assert {name: column.dtype for name, column in batch.columns().items()} == {
        "tokens": torch.int64,
        "attention_mask": torch.bool,
        "response_mask": torch.bool,
        "scores": torch.float32,
        "group": torch.int64,
    }


def test_dense_scores_stand_at_the_response_tokens_and_missing_ones_count_zero():
    batch = collate([Rollout([7, 8], [3, 4, 5], score=[1, 2.5])], pad_id=0)
    assert batch.scores.tolist() == [[0, 0, 1.0, 2.5, 0]]


def test_a_list_of_one_score_stands_at_the_first_response_token_and_a_number_at_the_last():
    batch = collate([Rollout([7], [3, 4, 5], score=[2.5]), Rollout([7], [3, 4, 5], score=2.5)], pad_id=0)
    assert batch.scores.tolist() == [[0, 2.5, 0, 0], [0, 0, 0, 2.5]]


def test_response_tokens_their_rows_and_pairs_are_found_by_number():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]]).bool()
    batch = TokenBatch(torch.zeros(6, 3, dtype=torch.int64), torch.ones(6, 3).bool(), mask, torch.zeros(6, 3))
    for found in (batch, batch.to("cpu")):
        assert [each.tolist() for each in found.at] == [[0, 0, 3, 4, 5], [1, 2, 2, 1, 1]]
        assert found.filled.tolist() == [0, 3, 4, 5] and found.pairs.tolist() == [0, 2]


def test_untrained_response_tokens_are_masked_and_the_score_stands_at_the_last_trained_one():
    batch = collate([Rollout([7], [3, 4, 5, 6], score=2.0, trained=[True, False, True, False])], pad_id=0)
    assert batch.response_mask.tolist() == [[False, True, False, True, False]]
    assert batch.attention_mask.all()
    assert batch.scores.tolist() == [[0, 0, 0, 2.0, 0]]


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (Rollout([7], [3], score=[1.0, 2.0]), "Rollout 1 has 2 scores for 1 response tokens"),
        (Rollout([], [3]), "Rollout 1 has an empty prompt"),
        (Rollout([7], []), "Rollout 1 has no response token"),
        (Rollout([7], [3], trained=[False]), "Rollout 1 has no response token"),
        (Rollout([7], [3], trained=[True, True]), "Rollout 1 has 2 flags"),
    ],
)
def test_a_rollout_that_makes_no_row_is_named(rollout, message):
    with pytest.raises(ValueError, match=message):
        collate([Rollout([7], [3]), rollout], pad_id=0)


def test_no_rollouts_make_no_batch():
    with pytest.raises(ValueError, match="no rollouts"):
        collate([], pad_id=0)


def test_right_pad_begins_all_rows_in_one_column_and_left_pad_ends_them_in_one():
    tokens, mask = right_pad([[7], [8, 9]], pad_id=5)
    assert tokens.tolist() == [[7, 5], [8, 9]] and mask.tolist() == [[1, 0], [1, 1]]
    assert tokens.dtype == mask.dtype == torch.int64
    tokens, mask = left_pad([[7], [8, 9]], pad_id=5)
    assert tokens.tolist() == [[5, 7], [8, 9]]
    assert mask.tolist() == [[0, 1], [1, 1]]
    assert tokens.dtype == mask.dtype == torch.int64
