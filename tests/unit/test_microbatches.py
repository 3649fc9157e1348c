"""How batches are cut into microbatches: by hand, and in a step of a trainer."""

from types import SimpleNamespace

import pytest
import torch

import trlx
from tests.builders import tiny_gpt2_config
from tests.runs import tiny_config
from trlx.backends import accelerate
from trlx.backends.microbatches import FEWEST, PASS_COST, at_least, filled, microbatches, row_lengths
from trlx.batch import Rollout, TokenBatch
from trlx.data.collate import collate
from trlx.models import memory
from trlx.models.decoder import blocks
from trlx.models.memory import bytes_per_token
from trlx.trainer.accelerate import AccelerateSFTTrainer


def test_rows_of_one_length_stay_in_order_and_fill_microbatches():
    assert microbatches([5, 5, 5, 5, 5], most_rows=2, pass_cost=64) == [[0, 1], [2, 3], [4]]


def test_long_and_short_rows_are_computed_apart_if_that_saves_more_than_a_pass_costs():
    # together 5 x 80 = 400; apart 2 x 80 + 3 x 12 = 196 and one more pass
    lengths = [80, 10, 70, 12, 11]
    assert microbatches(lengths, most_rows=5, pass_cost=203) == [[0, 2], [1, 3, 4]]
    assert microbatches(lengths, most_rows=5, pass_cost=205) == [[0, 1, 2, 3, 4]]
    assert microbatches(lengths, most_rows=5, pass_cost=9) == [[0], [2], [1, 3, 4]]  # 80 + 70 < 2 x 80 - 9


def test_pairs_stay_together_and_in_order():
    assert microbatches([3, 80, 76, 2, 11, 12], most_rows=4, pass_cost=10, together=2) == [[0, 1, 2, 3], [4, 5]]
    assert microbatches([3, 8, 70, 2, 11, 9], most_rows=2, pass_cost=10, together=2) == [[2, 3], [4, 5], [0, 1]]


def test_as_few_microbatches_as_possible_are_cut_where_that_saves_most():
    assert microbatches([9, 1, 1, 8, 1, 9], most_rows=4, pass_cost=FEWEST) == [[0, 3, 5], [1, 2, 4]]


def test_a_limit_of_tokens_counts_padding_and_lets_a_longer_row_be_alone():
    assert microbatches([30, 130, 50, 60], most_rows=4, pass_cost=FEWEST, most_tokens=120) == [[1], [2, 3], [0]]


def test_rows_without_padding_fill_microbatches_in_their_order():
    assert filled([30, 130, 50, 60, 9], most_rows=2) == [[0, 1], [2, 3], [4]]
    assert filled([30, 130, 50, 60, 9], most_rows=9, most_tokens=119) == [[0], [1], [2, 3, 4]]
    assert filled([30, 30, 50, 9], most_rows=4, together=2, most_tokens=118) == [[0, 1], [2, 3]]


def test_the_largest_microbatches_are_halved_where_another_process_has_more():
    assert at_least(1, [[0, 1], [2]]) == [[0, 1], [2]]
    assert at_least(4, [[4, 5], [0, 1, 2, 3]]) == [[4], [5], [0, 1], [2, 3]]
    assert at_least(3, [[0, 1, 2, 3, 4, 5]], together=2) == [[0, 1], [2, 3], [4, 5]]


def test_lengths_are_those_of_encoder_and_decoder_together():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    read = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    batch = TokenBatch(mask.long(), mask, mask, mask.float())
    assert row_lengths(batch) == [2, 1]
    assert row_lengths(batch.replace(encoder_tokens=read.long(), encoder_mask=read)) == [3, 5]


@pytest.mark.parametrize(
    "together, tokens, packing, sizes",
    [
        (1, None, False, [(1, 16), (3, 5)]),
        (2, None, False, [(2, 16), (2, 5)]),
        (1, 14, False, [(1, 16), (2, 5), (1, 5)]),
        (1, None, "auto", [(4, 16)]),
        (1, 14, True, [(1, 16), (2, 5), (1, 5)]),  # in the order of the shuffled rows
    ],
)
def test_a_step_computes_long_rows_apart_and_keeps_blocks_together(
    tmp_path, monkeypatch, together, tokens, packing, sizes
):
    monkeypatch.setattr(AccelerateSFTTrainer, "rows_together", together)
    seen = []
    monkeypatch.setattr(AccelerateSFTTrainer, "loss", watched(AccelerateSFTTrainer.loss, seen), raising=True)
    monkeypatch.setitem(PASS_COST, "cpu", 1)
    train = {"batch_size": 4, "total_steps": 2, "tokens_per_microbatch": tokens, "packing": packing}
    config = tiny_config(tmp_path, "SFT", train=train)
    trlx.train(samples=["abc", "a" * 14, "abc", "bca"], config=config)
    assert sorted(seen[-len(sizes) :]) == sorted(sizes)  # the first step also checks the loss


def test_a_pass_has_as_many_tokens_as_half_of_the_memory_holds_that_weights_leave(tmp_path, monkeypatch):
    def backend(layers=2, resid_pdrop=0.0, **train):
        model = {"model_path": tiny_gpt2_config(layers=layers, resid_pdrop=resid_pdrop), "num_layers_unfrozen": 1}
        return AccelerateSFTTrainer(tiny_config(tmp_path, "SFT", model=model, train=train)).backend

    policy = backend().policy
    each, trained = bytes_per_token(policy), sum(w.nbytes for w in policy.parameters() if w.requires_grad)
    assert each == bytes_per_token(backend(layers=3).policy)  # frozen blocks keep nothing
    # a block keeps at least 2 + 2 inputs of norms and layers, 3 of attention, 4 before and 4 after GELU
    assert each > 15 * policy.model.config.n_embd * 4
    assert each * 5 < trained  # five tokens are read, and weights do not count
    for free, tokens in ((3 * trained + 2 * 40 * each, 40), (0, 1)):
        for module in (accelerate, memory):
            monkeypatch.setattr(module, "free_memory", lambda *_, free=free: free)
        assert backend().microbatch_tokens == tokens
        assert backend(minibatch_size=4).microbatch_tokens is None
        assert backend().trunk.most == (free // 4, 0)
    assert backend(resid_pdrop=0.1).microbatch_tokens is None


def test_processes_share_the_memory_of_their_host(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=101))
    assert memory.free_memory(torch.device("cpu"), 4) == 25


def test_packing_that_the_model_cannot_is_refused_if_asked_for_and_left_out_if_not(tmp_path):
    model = {"model_extra_configs": {"attn_implementation": "eager"}}
    assert not AccelerateSFTTrainer(tiny_config(tmp_path, "SFT", model=model)).backend.packs
    backend = AccelerateSFTTrainer(tiny_config(tmp_path, "SFT")).backend
    assert backend.packs
    backend.device = torch.device("cuda")  # where it must be asked for
    assert not backend._packs("auto") and backend._packs("on")
    config = tiny_config(tmp_path, "SFT", model=model, train={"packing": "on"})
    with pytest.raises(ValueError, match="train.packing is on, but GPT2LMHeadModel computes attention with eager"):
        AccelerateSFTTrainer(config)


def watched(loss, seen):
    def watching(self, outputs, batch):
        seen.append(tuple(batch.tokens.shape))
        return loss(self, outputs, batch)

    return watching


@pytest.mark.parametrize(("dropout", "tokens"), [(0.0, 3), (0.1, 9)])
def test_equal_rows_are_computed_apart_where_dropout_differs(tmp_path, dropout, tokens):
    model = {"model_path": tiny_gpt2_config(resid_pdrop=dropout)}
    backend = AccelerateSFTTrainer(tiny_config(tmp_path, "SFT", model=model, train={"packing": "on"})).backend
    read = []
    blocks(backend.policy.model)[0].register_forward_hook(lambda block, args, output: read.append(args[0].shape[1]))
    backend.train_step(collate([Rollout([5], [6, 7])] * 3, 0), lambda outputs, batch: (outputs.logprobs.sum(), {}))
    assert read == [tokens]
