"""Guards: when each fires, how they are written, and what they do to a run."""

import json
import math
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from tests.runs import metrics, run, weights
from tests.unit.test_training import same
from trlx.batch import Rollout
from trlx.checkpoint import checkpoints
from trlx.config import ConfigError
from trlx.data.collate import collate
from trlx.guard_rules import guards_of, judge, remember, repeating
from trlx.run.guards import Guards

ON = guards_of({})
BROKEN = {"grad_norm": math.nan}


@pytest.mark.parametrize(
    ("measured", "kept", "fires"),
    [
        ({"policy/kl": 50.0}, {}, {"kl": False}),
        ({"policy/kl": 50.1}, {}, {"kl": True}),
        ({"policy/kl": math.nan}, {}, {"kl": True}),
        ({"policy/entropy": 0.02, "rollout_scores/std": 1e-6}, {}, {"entropy": False, "scores": False}),
        ({"policy/entropy": 0.019, "rollout_scores/std": 0.0}, {}, {"entropy": True, "scores": True}),
        # few responses ended from the first on: the limit is meant to end them
        ({"rollouts/ended": 0.0, "rollouts/repeating": 0.5}, {"ended": 0.4}, {"repeats": False}),
        ({"rollouts/ended": 0.04, "rollouts/repeating": 0.6}, {"ended": 0.5}, {"lengths": True, "repeats": True}),
        ({"rollouts/ended": 0.05}, {"ended": 0.5}, {"lengths": False}),
        ({"losses/value_loss": 9.0}, {}, {}),
        # 0.25 is 12.5 times 0.02; a value function that says 0 would lose (0.3**2 + 0.1**2) / 2 = 0.05, a fifth of it
        ({"losses/value_loss": 0.25}, {"value_loss": 0.02}, {"value_loss": True}),
        (
            {"losses/value_loss": 0.25, "returns/mean": 0.3, "returns/std": 0.1},
            {"value_loss": 0.02},
            {"value_loss": False},
        ),
        ({"grad_norm": 1e9}, {}, {"non_finite": False}),
        (BROKEN, {}, {"non_finite": True}),
    ],
)
def test_a_guard_fires_beyond_its_limit(measured, kept, fires):
    assert {name: fired for name, (_, fired) in judge(ON, measured, kept).items()} == fires


def test_a_value_loss_is_compared_with_the_mean_of_those_before_it():
    kept = {}
    for loss in (1.0, 2.0):
        remember(kept, {"losses/value_loss": loss}, [])
    # 0.9 * 1 + 0.1 * 2 = 1.1
    assert kept["value_loss"] == pytest.approx(1.1)
    assert judge(ON, {"losses/value_loss": 22.0}, kept)["value_loss"] == (pytest.approx(20.0), True)
    remember(kept, {"losses/value_loss": 22.0, "rollouts/ended": 0.7}, ["value_loss"])
    remember(kept, {"rollouts/ended": 0.2}, [])
    assert kept == {"value_loss": pytest.approx(1.1), "ended": 0.7}


def test_responses_that_repeat_themselves_or_each_other_are_counted():
    loop, plain = [1, 2, 3] * 6, list(range(20))  # 15 n-grams of which 3 differ, 17 of which 17
    # the first half of 8 + 12 repeats nothing: of 17 n-grams 8 are new, and then 5 of 9
    half = [*range(8), *[7] * 8]  # n-grams: 5 of different tokens, then 567 7, 677 7, and 6 times 7777: 8 of 13
    assert repeating([loop, plain, half], [[1], [1], [1]]) == pytest.approx(1 / 3)
    # to one prompt a sure policy gives one answer; to two prompts, something is wrong
    assert repeating([plain, plain], [[1], [1]]) == 0.0
    assert repeating([plain, plain], [[1], [2]]) == 0.5
    assert repeating([[5] * 15, [5] * 15], [[1], [2]]) == 0.0  # "yes", "yes"
    assert repeating([], []) == 0.0


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"kll": "warn"}, "Unknown key 'train.guards.kll'. Did you mean 'kl'"),
        ({"kl": "halt"}, "train.guards.kl: unknown action 'halt'. Known: off, warn, skip, stop"),
        ({"kl": {"action": "stop", "below": 3}}, "Unknown key 'train.guards.kl.below'.* Known: action, above"),
        ({"entropy": {"below": "low"}}, "train.guards.entropy.below must be a number, got 'low'"),
        ({"non_finite": "off"}, "train.guards.non_finite: unknown action 'off'. Known: skip, stop"),
        ({"non_finite": {"above": 3}}, "Unknown key 'train.guards.non_finite.above'.* Known: action"),
    ],
)
def test_what_a_guard_does_not_know_is_refused(written, told):
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        guards_of(written)


def test_guards_are_written_as_an_action_or_with_their_limit():
    written = {"kl": {"action": "stop", "above": "1e1"}, "entropy": {"below": 1}, "scores": False, "lengths": None}
    found = guards_of(written)
    assert (found["kl"].action, found["kl"].limit) == ("stop", 10.0)
    assert (found["entropy"].action, found["entropy"].limit) == ("warn", 1.0)
    assert "scores" not in found and found["lengths"] == ON["lengths"]
    assert {name: guard.action for name, guard in ON.items() if guard.action != "warn"} == {"non_finite": "skip"}


SELDOM = {"eval_interval": 100, "checkpoint_interval": 8, "record_steps": [2]}


def guarded(folder, steps=8, rollouts=8, **guards):
    """A PPO run with these guards. Half as many steps as rollouts train on a collection."""
    method = {"num_rollouts": rollouts}
    return run("PPO", folder, method=method, train={"guards": guards, "total_steps": steps, **SELDOM})


def lines_of(folder):
    return [line for line in metrics(folder) if "ratio" in line]


def test_a_guard_that_skips_leaves_the_weights_of_its_collections_alone(tmp_path, caplog):
    # no KL is below 0, so no collection is trained on, and the fifth in a row is the last
    trainer = guarded(tmp_path, steps=40, rollouts=4, scores="off", kl={"action": "skip", "above": -1.0})
    assert [line["skipped_steps"] for line in lines_of(tmp_path)] == [*range(1, 10)]
    assert trainer.schedule.why_finished == "train.guards.kl ended it at step 9"
    assert not any("grad_norm" in line for line in lines_of(tmp_path))
    # the weights are as good as they were, so checkpoints are written
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint_08", "checkpoint_09"]
    same(weights(tmp_path), load_file(tmp_path / "best_checkpoint" / "policy.safetensors"))
    # one line where it begins to fire, which is an alarm of the report too, and the whole collection beside it
    told = "Step 1: policy/kl is 0 nats per sequence, above -1: the steps on this collection will change nothing. Raise"
    alarms = [json.loads(line)["message"] for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert sum(told in message for message in alarms) == 1 and alarms[-1] == f"Step 9: {trainer.schedule.stopped}"
    dumped = tmp_path / "dumps" / "step_1_kl"
    batch, about = load_file(dumped / "batch.safetensors"), json.loads((dumped / "about.json").read_text())
    assert [path.name for path in dumped.parent.iterdir()] == ["step_1_kl"] and f"Its batch is in {dumped}" in alarms[0]
    assert {"tokens", "response_mask", "old_logprobs", "old_values", "advantages", "returns"} < batch.keys()
    assert len(batch["tokens"]) == len(about["samples"]) == 4 and about["metrics"]["policy/kl"] == 0
    assert [sample["score"] for sample in about["samples"]] == pytest.approx(batch["scores"].sum(dim=1).tolist())
    first = batch["tokens"][0][batch["response_mask"][0]]
    assert about["samples"][0]["response"] == trainer.tokenizer.decode(first.tolist())


def test_a_guard_that_stops_keeps_the_weights_of_the_step_before(tmp_path):
    trainer = guarded(tmp_path / "stopped", value_loss={"action": "stop", "above": 0.0})
    assert trainer.schedule.why_finished == "train.guards.value_loss ended it at step 2"
    assert len(load_file(tmp_path / "stopped/dumps/step_2_value_loss/batch.safetensors")["tokens"]) == 4
    guarded(tmp_path / "short", steps=1)
    same(weights(tmp_path / "stopped"), weights(tmp_path / "short"))
    # it goes on with other guards, which judge the next collection, and of that one without any
    again = {"resume_from_checkpoint": "auto", "guards": {"kl": {"action": "stop", "above": -1}}, **SELDOM}
    trainer = run("PPO", tmp_path / "stopped", train=again)
    assert trainer.schedule.why_finished == "train.guards.kl ended it at step 5"
    run("PPO", tmp_path / "stopped", train={**again, "guards": {}, "total_steps": 6})
    assert [line["step"] for line in lines_of(tmp_path / "stopped") if "grad_norm" in line] == [1, 3, 4, 6]


def stub(folder, guards, **backend):
    """What `Guards` reads of a trainer."""
    trainer = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(guards=guards, logging_dir=str(folder), record_steps=None)),
        backend=SimpleNamespace(
            is_main=True, can_leave_out=True, broadcast_object=lambda told: told, before_update=None, **backend
        ),
        schedule=SimpleNamespace(step=0, stopped=None, rows=lambda count: [0]),
        store=collate([Rollout([4], [5, 6], score=2.0), Rollout([7], [8], score=1.0)], pad_id=0),
        tokenizer=SimpleNamespace(decode=str),
        unit=None,
        rows_together=1,
        pending={},
    )
    trainer.stop = lambda why: setattr(trainer.schedule, "stopped", why)
    return trainer


def test_a_guard_that_fires_again_and_again_leaves_three_batches(tmp_path, caplog):
    norms = iter([math.nan, math.nan, 1.0] * 5)
    trainer = stub(tmp_path, {}, train_step=lambda *_: {"skipped_steps": 0.0, "grad_norm": next(norms)})
    guards = Guards(trainer)
    for _ in range(15):
        guards.count(guards.train_step(None, None))
        trainer.schedule.step += 1
    told = [message for message in caplog.messages if "gradients are not finite, nothing was updated" in message]
    assert [message.partition(":")[0] for message in told] == [f"Step {step}" for step in (1, 4, 7, 10, 13)]
    assert sorted(path.name for path in (tmp_path / "dumps").iterdir()) == [
        f"step_{step}_non_finite" for step in (1, 4, 7)
    ]
    about = json.loads((tmp_path / "dumps" / "step_1_non_finite" / "about.json").read_text())
    assert about["metrics"] == {"grad_norm": None}
    assert about["samples"] == [{"prompt": "[4]", "response": "[5, 6]", "score": 2.0}]


def test_a_batch_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "dumps").write_text("a file where the folder would be")
    trainer = stub(tmp_path, {"non_finite": "stop"}, train_step=lambda *_: {"skipped_steps": 1.0, **BROKEN})
    guards = Guards(trainer)
    guards.count(guards.train_step(None, None))
    assert "Its batch could not be written: " in caplog.text
    assert trainer.schedule.stopped == "train.guards.non_finite ended it at step 1"


def test_the_main_process_decides_for_the_others_which_write_no_batch(tmp_path):
    asked = []
    take = lambda *_: asked.append(trainer.backend.before_update({}))  # noqa: E731
    trainer = stub(tmp_path, {"kl": {"action": "skip", "above": 1}}, train_step=take)
    trainer.config.train.record_steps = 1
    for measured, decided, updates in ((0.5, (["kl"], []), False), (5.0, ([], []), True), (5.0, ([], ["kl"]), True)):
        trainer.backend.is_main, trainer.backend.broadcast_object = False, lambda _, decided=decided: decided
        trainer.pending = {"policy/kl": measured}
        Guards(trainer).train_step(None, None)
        assert asked.pop() == updates and trainer.backend.before_update is None
        assert trainer.schedule.stopped == (decided[1] and "train.guards.kl ended it at step 1" or None)
    assert not (tmp_path / "dumps").exists()


def test_a_guard_cannot_skip_where_gradients_cannot_be_dropped(tmp_path):
    trainer = stub(tmp_path, {"kl": "skip"})
    trainer.backend.can_leave_out = False
    with pytest.raises(ValueError, match="train.guards.kl: skip does not work under DeepSpeed"):
        Guards(trainer)
