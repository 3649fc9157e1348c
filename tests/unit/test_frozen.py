"""The output of frozen blocks is kept: it is computed once for each row, and training comes out the same."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import trlx
from tests.builders import tiny_gpt2_config
from tests.runs import PROMPTS, run, share_of_a, tiny_config, weights
from tests.unit.test_families import config_of
from tests.unit.test_models_policy import sharing_batch
from tests.unit.test_seq2seq import inputs, tiny_policy
from tests.unit.tiny_models import FAMILIES, tiny_model
from trlx.batch import Rollout, TokenBatch
from trlx.data.collate import EncoderDecoderRows, collate
from trlx.models import frozen, memory, packing
from trlx.models.decoder import blocks
from trlx.models.frozen import KeptStates, frozen_trunk
from trlx.models.policy import build_policy
from trlx.trainer.accelerate import AcceleratePPOTrainer, AccelerateSFTTrainer

TOP = {"model_path": tiny_gpt2_config(), "num_layers_unfrozen": 1}
ROWS = collate([Rollout([5, 6], [7, 8, 9]), Rollout([5], [7]), Rollout([9, 6, 5], [7, 8])], 0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("layers", "value_layers", "frozen"), [(1, 0, 2), (0, 0, 3), (1, 2, 1), (3, 0, 0)])
def test_every_family_can_skip_its_frozen_blocks(name, layers, value_layers, frozen):
    model = AutoModelForCausalLM.from_config(config_of(name))
    assert len(blocks(model)) == 3
    settings = {"value_head": True, "value_layers": value_layers, "dropout": False}
    policy = build_policy(model, num_layers_unfrozen=layers, **settings).eval()
    trunk = frozen_trunk(policy, 1e9)
    if layers == 3:
        # with tied embeddings the lowest block is above frozen embeddings all the same
        assert trunk is None
        return
    assert len(trunk.frozen) == frozen
    columns = ROWS.tokens, ROWS.attention_mask, ROWS.response_mask
    expected = policy(*columns)
    for _ in range(2):
        with trunk.skipped(ROWS, None, "cpu"):
            found = policy(*columns)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.values, expected.values, atol=1e-6, rtol=0)
    assert torch.equal(policy(*columns).logprobs, expected.logprobs)


def test_a_decoder_that_reads_two_prompts_keeps_two_outputs():
    rows = [Rollout([5, 6, 2], [7, 8]), Rollout([9, 2], [7, 8])]
    batch = EncoderDecoderRows(0).collate(rows, pad_id=0)
    policy = tiny_policy("bart", num_layers_unfrozen=1).eval()
    trunk = frozen_trunk(policy, 1e9)
    expected = policy(*inputs(batch)).logprobs
    with trunk.skipped(batch, None, "cpu"):
        found = policy(*inputs(batch)).logprobs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(trunk.kept) == 2 and (expected[0] - expected[1]).abs().max() > 0.01


def test_what_is_kept_of_a_row_does_not_depend_on_the_rows_beside_it():
    # else a resumed run, which computes other rows together, would not be bit-equal
    model = AutoModelForCausalLM.from_config(tiny_gpt2_config(hidden=64))
    rows = [Rollout([5, 6, 7], [8] * length) for length in (29, 14, 3)]
    kept = []
    for cut in ([rows], [[row] for row in rows], [rows[1:], rows[:1]]):
        policy = build_policy(model, num_layers_unfrozen=1).eval()
        trunk = frozen_trunk(policy, 1e9)
        for part in cut:
            trunk._states(collate(part, 0), "cpu")
        kept.append(trunk.kept)
    for found in kept[1:]:
        assert found.keys() == kept[0].keys() and len(found) == 3
        assert all(torch.equal(found[key], kept[0][key]) for key in found)


def test_packed_rows_that_share_a_beginning_skip_their_frozen_blocks_too(monkeypatch):
    monkeypatch.setattr(packing, "SHARED", 3)
    tokens, attention_mask, response_mask = sharing_batch()
    batch = TokenBatch(tokens, attention_mask, response_mask, torch.zeros(tokens.shape))
    policy = build_policy(tiny_model("gpt2"), num_layers_unfrozen=1).eval()
    trunk = frozen_trunk(policy, 1e9)
    rows = packing.packed(tokens, attention_mask)
    expected = policy(*sharing_batch(), rows=rows).logprobs
    with trunk.skipped(batch, rows, "cpu"):
        torch.testing.assert_close(policy(*sharing_batch(), rows=rows).logprobs, expected, atol=1e-5, rtol=0)
    together = trunk._computed(batch, "cpu")  # as on a GPU
    for states, alone in zip(together, trunk._states(batch, "cpu"), strict=True):
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=0)


def test_what_is_kept_of_a_row_does_not_hold_the_other_rows_in_memory():
    kept = KeptStates(20)
    assert kept.has_room(b"row", 8) and kept.has_room(b"row", 8) and kept.left == [12, 0]
    kept.keep(b"row", torch.zeros(5, 2)[1])
    assert kept.kept[b"row"].untyped_storage().nbytes() == 8


def test_rows_that_do_not_fit_on_a_gpu_are_kept_in_main_memory(monkeypatch):
    # rows of 4, 3 and 2 tokens with 8 numbers each; the first fits where it is, the second no longer, the third again
    policy = build_policy(AutoModelForCausalLM.from_config(tiny_gpt2_config(hidden=8)), num_layers_unfrozen=1).eval()
    batch, pinned = collate([Rollout([5], [8] * length) for length in (3, 2, 1)], 0), []
    monkeypatch.setattr(frozen, "_pinned_like", lambda like: pinned.append(torch.full_like(like, 7.0)) or pinned[-1])
    trunk = frozen_trunk(policy, 6 * 8 * 4, 4 * 8 * 4)
    expected = trunk._states(batch, "cpu")
    # which takes 128 bytes for its 96
    assert [len(each) for each in pinned] == [3] and trunk.left == [0, 0]
    monkeypatch.setattr(trunk, "_computed", None)  # nothing is computed again
    for found, states in zip(trunk._states(batch, "cpu"), expected, strict=True):
        assert torch.equal(found, states)
    assert trunk.kept.keys() == trunk.room.keys() and torch.equal(pinned[0], expected[1])
    trunk.forget()
    assert trunk.left == [6 * 8 * 4, 4 * 8 * 4] and not trunk.kept


def test_auto_keeps_a_quarter_of_what_is_free_on_a_gpu_and_in_main_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device, n: {"cpu": 1600, "cuda": 800}[device.type] // n)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert memory.room_for_states("auto", gpu, 2) == (100, 200) and memory.room_for_states("auto", cpu, 2) == (200, 0)
    assert memory.room_for_states(50, gpu, 2) == (50, 0)


def backend_of(folder, **train):
    config = tiny_config(folder, "PPO", model=TOP, train={"packing": "off", **train})  # so that rows can be counted
    return AcceleratePPOTrainer(config, reward_fn=share_of_a).backend


def rows_computed(backend, block):
    """A list that gets the number of rows at each run of a block."""
    counted = []
    own = blocks(backend.policy.model)[block].ln_1
    own.register_forward_hook(lambda module, args, output: counted.append(len(output)))
    return counted


def use(backend):
    """What a collection and two passes over it compute."""
    backend.evaluate(ROWS)
    backend.evaluate(ROWS, reference=True)
    for _ in range(2):
        backend.train_step(ROWS, lambda outputs, batch: (outputs.logprobs.sum(), {}))


def test_frozen_blocks_run_once_for_each_row_and_the_others_each_time(tmp_path):
    backend = backend_of(tmp_path)
    lower, upper = rows_computed(backend, 0), rows_computed(backend, -1)
    use(backend)
    assert (sum(lower), sum(upper)) == (3, 12)
    backend.forget_rows()
    backend.evaluate(ROWS)
    assert (sum(lower), sum(upper)) == (6, 15)


def test_rows_that_do_not_fit_are_computed_each_time_and_off_keeps_none(tmp_path):
    width = TOP["model_path"].n_embd
    lower = rows_computed(backend := backend_of(tmp_path, cache_hidden_states=7 * width * 4), 0)
    use(backend)
    # five tokens and two fit, the other five do not
    assert sum(lower) == 1 + 1 + 4
    backend.forget_rows()  # and then they have room again
    backend.evaluate(ROWS)
    assert len(backend.trunk.kept) == 2
    lower = rows_computed(backend := backend_of(tmp_path, cache_hidden_states=False), 0)
    use(backend)
    assert sum(lower) == 12 and backend.trunk is None


@pytest.mark.parametrize("algorithm", ["PPO", "ILQL", "DPO"])
@pytest.mark.parametrize("train", [{}, {"gradient_checkpointing": True}])
def test_training_comes_out_the_same(tmp_path, algorithm, train):
    method = {"num_value_layers_unfrozen": 2} if algorithm == "PPO" else {}
    model = {"model_path": tiny_gpt2_config(layers=3), "num_layers_unfrozen": 1}
    sgd = {"name": "sgd", "kwargs": {"lr": 0.1}}
    for setting in ("auto", "off"):
        changes = {"cache_hidden_states": setting, "total_steps": 4, **train}
        trainer = run(algorithm, tmp_path / setting, model=model, method=method, optimizer=sgd, train=changes)
        assert (trainer.backend.trunk is None) == (setting == "off")
    on, off = weights(tmp_path / "auto"), weights(tmp_path / "off")
    assert max(float((on[name] - off[name]).abs().max()) for name in on) < 1e-6


def test_a_new_collection_drops_the_rows_of_the_last_one(tmp_path):
    config = tiny_config(tmp_path, "PPO", model=TOP, train={"total_steps": 7, "eval_interval": 99})
    trainer = trlx.train(config=config, reward_fn=share_of_a, prompts=PROMPTS)
    assert trainer.schedule.epoch == 1  # in the second collection
    assert 0 < len(trainer.backend.trunk.kept) <= config.method.num_rollouts


def test_what_has_dropout_or_an_adapter_below_runs_whole(tmp_path):
    dropping = tiny_gpt2_config(resid_pdrop=0.1)
    config = tiny_config(tmp_path, "SFT", model={"model_path": dropping, "num_layers_unfrozen": 1})
    assert AccelerateSFTTrainer(config).backend.trunk is None
    pytest.importorskip("peft")
    for layers, count in ((None, None), ([1], 1)):
        adapter = {"peft_type": "LORA", "r": 2, "layers_to_transform": layers}
        config = tiny_config(tmp_path, "SFT", model={"model_path": tiny_gpt2_config(), "peft_config": adapter})
        trunk = AccelerateSFTTrainer(config).backend.trunk
        assert (trunk and len(trunk.frozen)) == count
