"""Callbacks see the numbers of a run, add to them, and end it; early stopping counts evaluations."""

import logging
from types import SimpleNamespace

import pytest

import trlx
from tests.runs import DATA, metrics, tiny_config, weights
from trlx.checkpoint import newest
from trlx.run.callbacks import Callbacks


class Recorder(trlx.Callback):
    """Remembers its calls, and adds a number to what is logged."""

    def __init__(self, last=None):
        self.calls, self.last = [], last

    def on_start(self, trainer):
        self.calls.append(("start", trainer.schedule.step))

    def on_step(self, trainer, metrics):
        self.calls.append(("step", trainer.schedule.step))
        metrics["own"] = 2.0 * metrics["loss"]
        if trainer.schedule.step == self.last:
            trainer.stop("enough")

    def on_evaluation(self, trainer, metrics):
        self.calls.append(("evaluation", trainer.schedule.step))
        metrics["eval/own"] = 7.0

    def on_end(self, trainer):
        self.calls.append(("end", trainer.schedule.step))

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        self.calls.append(("loaded", state["calls"]))


def sft(folder, callbacks, **train):
    config = tiny_config(folder, "SFT", train={"total_steps": 4, "eval_interval": 2, **train})
    return trlx.train(config=config, callbacks=callbacks, **DATA["SFT"])


def test_callbacks_see_every_step_and_evaluation_and_add_numbers_to_them(tmp_path):
    seen = Recorder()
    trainer = sft(tmp_path, [seen])
    steps = ["start 0", "evaluation 0", "step 1", "step 2", "evaluation 2", "step 3", "step 4", "evaluation 4", "end 4"]
    assert [f"{event} {step}" for event, step in seen.calls] == steps
    lines = trainer.history
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    assert all(line["own"] == 2 * line["loss"] for line in lines if "loss" in line)
    assert [line["eval/own"] for line in lines if "eval/own" in line] == [7.0] * 3
    # and the run is that without callbacks
    sft(tmp_path / "alone", None)
    own = ("own", "eval/own")
    without = [{name: value for name, value in line.items() if name not in own} for line in metrics(tmp_path)]
    assert without == metrics(tmp_path / "alone")


def test_a_stopped_run_evaluates_saves_and_goes_on_only_without_callbacks(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="trlx")
    seen = Recorder(last=3)
    sft(tmp_path, [seen])
    assert seen.calls[-3:] == [("step", 3), ("evaluation", 3), ("end", 3)]
    assert newest(tmp_path).name == "checkpoint_3"
    again = Recorder()
    sft(tmp_path, [again], resume_from_checkpoint="auto")
    # seven calls came before the checkpoint: the start, three evaluations and three steps
    assert again.calls == [("loaded", 7), ("start", 3), ("end", 3)]
    sft(tmp_path, [Recorder(), Recorder()], resume_from_checkpoint="auto")
    assert any("The callbacks are not those" in message for message in caplog.messages)
    trainer = sft(tmp_path, None, resume_from_checkpoint="auto")
    assert trainer.schedule.step == 4 and trainer.schedule.why_finished == "train.total_steps are done"
    sft(tmp_path / "whole", None)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path)
    assert all((expected[name] == found[name]).all() for name in expected)


def test_a_stop_on_another_process_is_a_stop_here():
    trainer = SimpleNamespace(schedule=SimpleNamespace(stopped=None))
    asked = []
    trainer.backend = SimpleNamespace(any_process=lambda flag: asked.append(flag) or True)
    callbacks = Callbacks(trainer)
    callbacks.tell("on_step", {})
    assert trainer.schedule.stopped is None  # without callbacks nothing is asked
    callbacks.append(trlx.Callback())
    callbacks.tell("on_step", {})
    assert trainer.schedule.stopped == "a callback on another process ended the run"
    trainer.schedule.stopped = "enough"
    callbacks.tell("on_step", {})
    assert asked == [False, True] and trainer.schedule.stopped == "enough"


def evaluated(stopping, values):
    """Why the run was ended, and the index of the evaluation that ended it."""
    said = []
    for index, value in enumerate(values):
        stopping.on_evaluation(SimpleNamespace(stop=said.append), {stopping.metric: value})
        if said:
            return said[0], index
    return None, None


def test_early_stopping_counts_evaluations_that_are_no_better():
    why, index = evaluated(trlx.EarlyStopping(patience=2), [0.1, 0.3, 0.3, 0.2, 0.9])
    assert (why, index) == ("reward/mean was no better than 0.3 in 2 evaluations", 3)
    assert evaluated(trlx.EarlyStopping(patience=2), [0.1, 0.05, 0.2, 0.15, 0.25, 0.2]) == (None, None)
    why, index = evaluated(trlx.EarlyStopping("eval/loss", 1, mode="min"), [3.0, 2.0, 2.5])
    assert (why, index) == ("eval/loss was no better than 2 in 1 evaluations", 2)
    assert evaluated(trlx.EarlyStopping(patience=1, min_delta=0.1), [1.0, 1.05])[1] == 1
    first, second = trlx.EarlyStopping(patience=2), trlx.EarlyStopping(patience=2)
    evaluated(first, [0.5, 0.4])
    second.load_state_dict(first.state_dict())
    assert evaluated(second, [0.5])[1] == 0


def test_what_cannot_work_is_refused(tmp_path):
    for wrong in ({"patience": 0}, {"min_delta": -1}, {"mode": "high"}):
        with pytest.raises(ValueError, match="EarlyStopping needs patience"):
            trlx.EarlyStopping(**wrong)
    with pytest.raises(ValueError, match="watches 'reward/meen'.* Did you mean 'reward/mean'"):
        trlx.EarlyStopping("reward/meen").on_evaluation(None, {"reward/mean": 1.0})
    with pytest.raises(TypeError, match=r"callbacks takes a list of trlx.Callback, and .* is none; write it with \(\)"):
        sft(tmp_path, [trlx.EarlyStopping])
    with pytest.raises(TypeError, match="and 3 is none$"):
        sft(tmp_path, [3])
