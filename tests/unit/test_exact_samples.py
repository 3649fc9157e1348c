"""Where the sampler's own log-probabilities and values stand in for a pass of the policy over its samples."""

from dataclasses import replace

import pytest
import torch

import trlx
from tests.runs import PROMPTS, run, share_of_a, tiny_config
from trlx.batch import Sample


def passes_of_a_collection(trainer):
    """The collection, and for each pass that it took whether it was one of the reference."""
    passes, evaluate = [], trainer.backend.evaluate
    trainer.backend.evaluate = lambda batch, reference=False: passes.append(reference) or evaluate(batch, reference)
    try:
        return trainer.collect(), passes
    finally:
        trainer.backend.evaluate = evaluate


def test_after_the_first_collection_the_sampler_says_log_probabilities_and_values(tmp_path):
    trainer = run("PPO", tmp_path, train={"total_steps": 6}, optimizer={"kwargs": {"lr": 0.03}})
    assert trainer._is_exact is True and trainer.state_dict()["exact"] is True
    batch, passes = passes_of_a_collection(trainer)
    assert passes == [True] and "rollouts/logprob_gap/mean" not in trainer.pending
    truth = trainer.backend.evaluate(batch)
    assert truth.values.abs().max() > 0.01
    torch.testing.assert_close(batch.old_logprobs, truth.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.old_values, truth.values, atol=1e-5, rtol=0)
    for change in ({"exact": False}, {"exact": None}):  # not close enough, or not seen yet
        trainer.load_state_dict({**trainer.state_dict(), **change})
        assert passes_of_a_collection(trainer)[1] == [False, True]
    assert trainer._is_exact is True and trainer.pending["rollouts/logprob_gap/max"] < 1e-5
    generate = trainer.sampler.generate
    for distance, exact in ((1e-3, False), (1e-6, True)):
        trainer._is_exact = None
        trainer.sampler.generate = lambda *args, by=distance: [
            replace(sample, logprobs=[number - by for number in sample.logprobs]) for sample in generate(*args)
        ]
        trainer.collect()
        assert trainer._is_exact is exact
    trainer.sampler.generate = lambda *args: [*generate(*args)[:-1], Sample([4, 2])]
    assert passes_of_a_collection(trainer)[1] == [False, True]  # one row says nothing
    trainer.sampler.generate = generate
    for holder, name, value in ((trainer.backend, "precision", torch.bfloat16), (trainer.sampler, "exact", False)):
        own = getattr(holder, name)
        setattr(holder, name, value)
        assert passes_of_a_collection(trainer)[1] == [False, True]
        setattr(holder, name, own)
    assert passes_of_a_collection(trainer)[1] == [True]


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({"method": {"num_value_layers_unfrozen": 1}}, True),
        ({"method": {"gen_kwargs": {"top_k": 5}}}, None),
    ],
)
def test_what_the_sampler_cannot_say_as_exactly_takes_a_pass_each_time(tmp_path, changes, exact):
    trainer = run("PPO", tmp_path, train={"total_steps": 2}, **changes)
    assert trainer._is_exact is exact
    assert passes_of_a_collection(trainer)[1] == [False, True]


def test_an_eos_that_was_not_drawn_takes_a_pass(tmp_path):
    config = tiny_config(tmp_path, "PPO", train={"total_steps": 2})
    trainer = trlx.train(reward_fn=share_of_a, prompts=PROMPTS, config=config, stop_sequences=list("abcdefghijklm"))
    batch, passes = passes_of_a_collection(trainer)
    assert passes == [False, True] and trainer._is_exact
    truth = trainer.backend.evaluate(batch)
    torch.testing.assert_close(batch.old_logprobs, truth.logprobs, atol=1e-5, rtol=0)
