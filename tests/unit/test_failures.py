"""A run that ends early saves what it can, says how to go on, and shows whose fault it is."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import pytest
import torch

import trlx
from tests.fake_backend import FakeBackend
from tests.runs import DATA, PROMPTS, length, metrics, run, share_of_a, tiny_config, weights
from tests.unit.test_checkpoint import write
from trlx import checkpoint
from trlx.backends import distress
from trlx.backends.accelerate import AccelerateBackend
from trlx.backends.interrupts import Interrupted, Interrupts, interruptible
from trlx.rewards.scoring import RewardError
from trlx.run import failures
from trlx.sampling.generate import TransformersSampler

TOLD = "The last checkpoint is {}, of step {}; to go on from there: train.resume_from_checkpoint=auto"


def saved_step(folder):
    return checkpoint.read_state(checkpoint.newest(folder))[0]["schedule"]["step"]


def same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def run_and_signal(folder, number, call, **train):
    """PPO whose reward function hangs from its `call`th call on, while a signal comes: calls 1 and 4 are evaluations,
    2 and 3, 5 and 6 the collections before steps 1 and 5."""
    calls, asleep = [], threading.Event()

    def reward(samples, prompts, outputs, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            asleep.wait(60)
        return share_of_a(samples, prompts, outputs)

    config = tiny_config(folder, "PPO", train={"checkpoint_interval": 100, **train})
    try:
        trlx.train(config=config, metric_fn=length, reward_fn=reward, prompts=PROMPTS)
    finally:
        asleep.set()


def test_a_signal_while_the_reward_hangs_saves_the_last_step_and_the_run_goes_on_from_there(tmp_path, caplog):
    run("PPO", tmp_path / "whole")
    before = [signal.getsignal(number) for number in Interrupts.SIGNALS]
    # the evaluation that a signal ended, call 4, is made up for
    for number, call in ((signal.SIGTERM, 4), (signal.SIGUSR1, 6), (signal.SIGINT, 6)):
        folder = tmp_path / f"{call}_{number}"
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
            run_and_signal(folder, number, call)
        told = TOLD.format(checkpoint.newest(folder), 4)
        if number == signal.SIGINT:
            assert stopped.value.__notes__ == [f"Stopped at step 4 by SIGINT. {told}"]
        else:
            assert stopped.value.code == 75 and f"Stopped at step 4 by {number.name}. {told}" in caplog.text
        assert [signal.getsignal(number) for number in Interrupts.SIGNALS] == before
        run("PPO", folder, train={"resume_from_checkpoint": "auto"})
        same(weights(tmp_path / "whole"), weights(folder))
        assert metrics(folder) == metrics(tmp_path / "whole")


def test_a_signal_before_anything_is_trained_saves_nothing(tmp_path, caplog):
    with pytest.raises(SystemExit):
        run_and_signal(tmp_path, signal.SIGTERM, call=1)
    assert checkpoint.newest(tmp_path) is None
    assert "Stopped at step 0 by SIGTERM. There is no checkpoint yet" in caplog.text


def test_a_signal_ends_a_reward_that_hangs_where_each_process_scores_its_own(tmp_path):
    with pytest.raises(SystemExit):
        run_and_signal(tmp_path, signal.SIGTERM, call=5, reward_on="each_rank")
    assert saved_step(tmp_path) == 4


def signal_at(call, where, monkeypatch, cls=AccelerateBackend):
    """SIGTERM comes at the `call`th call of `cls`'s method `where`. Returns a list as long as it was called."""
    method, calls = getattr(cls, where), []

    def signalled(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(cls, where, signalled)
    return calls


@pytest.mark.parametrize("call", [1, 3], ids=["evaluation", "collection"])
def test_a_signal_while_samples_are_drawn_leaves_with_the_batch_in_hand(tmp_path, monkeypatch, call):
    # two batches of an evaluation, two of a collection
    calls = signal_at(call, "generate", monkeypatch, TransformersSampler)
    with pytest.raises(SystemExit):
        trlx.train(config=tiny_config(tmp_path, "PPO"), eval_prompts=PROMPTS, **DATA["PPO"])
    assert len(calls) == call


def test_a_signal_in_the_middle_of_an_update_leaves_after_it(tmp_path, monkeypatch):
    signal_at(3, "train_step", monkeypatch)
    with pytest.raises(SystemExit):
        run("SFT", tmp_path, train={"checkpoint_interval": 100, "eval_interval": 100})
    assert saved_step(tmp_path) == 3


def test_a_signal_while_a_metric_hangs_saves_too(tmp_path):
    def metric(samples, step, **kwargs):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return {}

    with pytest.raises(SystemExit):
        trlx.train(config=tiny_config(tmp_path, "PPO"), metric_fn=metric, **DATA["PPO"])
    assert saved_step(tmp_path) == 4


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, capsys):
    step = AccelerateBackend.train_step

    def twice(self, *args):
        if self.scheduler.last_epoch == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(AccelerateBackend, "train_step", twice)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run("SFT", tmp_path, train={"checkpoint_interval": 100})
    assert checkpoint.newest(tmp_path) is None
    assert stopped.value.__notes__ == ["Step 2 is not saved: stopped at once. There is no checkpoint yet"]
    assert capsys.readouterr().err.count("Ctrl-C: saving") == 1


def test_ctrl_c_that_a_shell_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
        assert interrupts.received is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_is_only_noted_but_where_it_may_interrupt():
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGUSR1)
        assert interrupts.received == "SIGUSR1"
        with pytest.raises(Interrupted, match="SIGUSR1"), interruptible():
            pytest.fail("the signal came before the block")
    with Interrupts(), pytest.raises(Interrupted, match="SIGTERM"), interruptible():
        signal.raise_signal(signal.SIGTERM)
    with interruptible():  # no run, nobody to save
        pass


def fail_from(call, where, monkeypatch, error, cls=AccelerateBackend):
    """The method `where` of `cls` fails at its `call`th call."""
    method, calls = getattr(cls, where), []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return method(self, *args, **kwargs)

    monkeypatch.setattr(cls, where, failing)


def test_any_error_between_steps_saves_what_was_trained(tmp_path, monkeypatch):
    run("PPO", tmp_path / "whole")
    with monkeypatch.context() as patched:  # two evaluations, and two collections of two chunks
        fail_from(6, "generate", patched, MemoryError("no memory left"), TransformersSampler)
        with pytest.raises(MemoryError, match="no memory left") as stopped:
            run("PPO", tmp_path / "stopped", train={"checkpoint_interval": 100})
    assert stopped.value.__notes__ == [TOLD.format(tmp_path / "stopped" / "checkpoint_4", 4)]
    run("PPO", tmp_path / "stopped", train={"resume_from_checkpoint": "auto"})
    same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


def test_a_reward_that_ends_the_program_leaves_word_of_what_is_saved(tmp_path, caplog):
    def reward(outputs, step):
        if step == 4:
            sys.exit(3)
        return [float(len(output)) for output in outputs]

    with pytest.raises(SystemExit, match="3"):
        train = {"checkpoint_interval": 3, "eval_interval": 100}
        trlx.train(config=tiny_config(tmp_path, "PPO", train=train), reward_fn=reward, prompts=PROMPTS)
    assert f"sys.exit(3) was called at step 4. {TOLD.format(tmp_path / 'checkpoint_4', 4)}" in caplog.text


def test_an_error_in_the_middle_of_an_update_saves_nothing(tmp_path, monkeypatch):
    fail_from(4, "update_heads", monkeypatch, FloatingPointError("overflow"))  # every second step
    with pytest.raises(FloatingPointError) as stopped:
        run("ILQL", tmp_path, train={"checkpoint_interval": 3})
    assert saved_step(tmp_path) == 6
    problem = "Step 8 is not saved: the error came in the middle of an update."
    assert stopped.value.__notes__ == [f"{problem} {TOLD.format(tmp_path / 'checkpoint_6', 6)}"]


@pytest.mark.parametrize(
    ("train", "kept"),
    [
        ({"checkpoint_interval": 1, "eval_interval": 100}, [2, 3, 4]),  # the checkpoint that is due finds out
        ({"checkpoint_interval": 2, "eval_interval": 5}, [2, 4]),  # so does sampling
    ],
)
def test_weights_that_have_diverged_take_the_place_of_no_checkpoint(tmp_path, monkeypatch, train, kept):
    update = AccelerateBackend.train_step

    def growing(self, *args):
        metrics = update(self, *args)
        if self.scheduler.last_epoch == 5:
            for weight in self.policy.parameters():
                weight.data.mul_(1e30)
        return metrics

    monkeypatch.setattr(AccelerateBackend, "train_step", growing)
    with pytest.raises(FloatingPointError, match=r"have diverged \(lower optimizer.kwargs.lr\)") as stopped:
        run("SFT", tmp_path, train={"keep_checkpoints": 3, **train})
    problem = "Step 5 is not saved: its weights are of no use."
    assert stopped.value.__notes__ == [f"{problem} {TOLD.format(tmp_path / 'checkpoint_4', 4)}"]
    assert [int(path.name[-1]) for path in checkpoint.checkpoints(tmp_path)] == kept


def test_a_checkpoint_of_the_weights_that_no_step_could_change_is_not_recommended(tmp_path, monkeypatch):
    update = AccelerateBackend.train_step

    def overflowing(self, *args):
        metrics = update(self, *args) if self.scheduler.last_epoch < 5 else {"loss": 1.0}
        return {"grad_norm": float("inf"), "skipped_steps": 1.0, **metrics}

    monkeypatch.setattr(AccelerateBackend, "train_step", overflowing)
    with pytest.raises(FloatingPointError, match="25 steps in a row") as stopped:
        run("SFT", tmp_path, train={"checkpoint_interval": 1, "eval_interval": 100, "total_steps": 40})
    last, good = tmp_path / "checkpoint_05", tmp_path / "checkpoint_04"
    problem = f"Step 30 is not saved: its weights are of no use, nor are those of {last}, which are the same."
    told = f"The last checkpoint is {good}, of step 4; to go on from there: train.resume_from_checkpoint={good}"
    assert stopped.value.__notes__ == [f"{problem} {told}"]


def test_the_checkpoint_before_is_found_by_its_step_also_where_names_have_other_numbers_of_digits(tmp_path):
    for name, step in (("checkpoint_8", 8), ("checkpoint_9", 9), ("checkpoint_010", 10)):
        write(tmp_path / name, step)
    trainer = SimpleNamespace(schedule=SimpleNamespace(step=12), guards=SimpleNamespace(in_a_row=2))
    trainer.saved = tmp_path / "checkpoint_010", 10
    failures._passed_over(trainer)
    assert trainer.saved == (tmp_path / "checkpoint_9", 9)


def test_where_saving_fails_both_errors_are_shown(tmp_path, monkeypatch):
    fail_from(1, "save", monkeypatch, OSError(28, "No space left"))
    fail_from(6, "generate", monkeypatch, MemoryError("no memory left"), TransformersSampler)
    with pytest.raises(OSError, match="No space left") as stopped:
        run("PPO", tmp_path, train={"checkpoint_interval": 100, "save_best": False})
    assert isinstance(stopped.value.__context__, MemoryError)
    assert stopped.value.__notes__[0] == "Step 4 is not saved. There is no checkpoint yet"


def test_what_lies_in_another_folder_is_named_by_its_path(tmp_path, monkeypatch):
    run("SFT", tmp_path / "old", train={"total_steps": 1})
    old = tmp_path / "old" / "checkpoint_1"
    fail_from(1, "train_step", monkeypatch, MemoryError("no memory left"))
    with pytest.raises(MemoryError) as stopped:
        run("SFT", tmp_path / "new", train={"resume_from_checkpoint": str(old)})
    told = f"The last checkpoint is {old}, of step 1; to go on from there: train.resume_from_checkpoint={old}"
    assert stopped.value.__notes__ == [told]


def test_an_error_on_one_of_several_processes_saves_nothing(monkeypatch):
    monkeypatch.setattr(distress, "_is_multiprocess", lambda: True)
    saves = []
    trainer = SimpleNamespace(
        schedule=SimpleNamespace(step=4), saved=None, at_boundary=True, save=lambda: saves.append(1), config=None
    )
    told = "Step 4 is not saved: the error is not on all processes, which save together. There is no checkpoint yet"
    assert failures._save(trainer, MemoryError(), first_step=0) == told and not saves
    failures._save(trainer, distress.shared(MemoryError()), first_step=0)
    assert len(saves) == 1


class TwoProcesses(FakeBackend):
    """What two processes send each other, one after the other: the first is the main one."""

    def __init__(self):
        self.is_main, self.sent = True, []

    def broadcast_object(self, value):
        self.sent.append(value)
        return self.sent[0]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RewardError("no number"), RewardError, "no number"),
        (Interrupted("SIGTERM"), Interrupted, "SIGTERM"),
        (ZeroDivisionError("by 0"), distress.ErrorElsewhere, "ZeroDivisionError: by 0 (on process 0)"),
        (SystemExit(3), distress.ErrorElsewhere, "SystemExit: 3 (on process 0)"),
    ],
)
def test_whatever_a_function_raises_on_the_main_process_is_raised_on_all(monkeypatch, error, kind, message):
    monkeypatch.setattr(distress, "_is_multiprocess", lambda: True)

    def fn():
        raise error

    backend = TwoProcesses()
    with pytest.raises(type(error)) as raised:
        backend.on_main(fn)
    assert raised.value is error and distress.is_shared(error)
    backend.is_main = False
    with pytest.raises(kind) as elsewhere:
        backend.on_main(fn)
    assert str(elsewhere.value) == message and distress.is_shared(elsewhere.value)


class TwoRanks(FakeBackend):
    """The second of two processes that each score their own; `told` is what the first one has sent."""

    told = None

    def __init__(self):
        pass

    def gather_objects(self, objects):
        return [self.told, *objects]


def test_what_a_function_raises_on_one_rank_is_raised_on_the_others():
    backend = TwoRanks()
    backend.told = ("RewardError", "no number", 0)
    with pytest.raises(RewardError, match="no number") as elsewhere:
        backend.on_each_rank(lambda: [1.0])
    assert elsewhere.value.__notes__ == ["It was raised on process 0"]
    backend.told = None
    assert backend.on_each_rank(lambda: [1.0]) == [None, 1.0]


def my_reward(outputs, **kwargs):
    return [my_judge(output) for output in outputs]


def my_judge(output):
    raise KeyError("no such answer")


def shown(error):
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def test_an_error_of_the_users_function_shows_the_users_frames_alone(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "PPO")
    with pytest.raises(RewardError) as raised:
        trlx.train(config=config, prompts=PROMPTS, reward_fn=my_reward)
    here = "test_an_error_of_the_users_function_shows_the_users_frames_alone"
    assert shown(raised.value) == [here]
    frames = [name for name in shown(raised.value.__cause__) if name != "<listcomp>"]  # there is none in Python 3.12
    assert frames == ["my_reward", "my_judge"]
    monkeypatch.setenv("TRLX_TRACEBACKS", "full")
    with pytest.raises(RewardError) as raised:
        trlx.train(config=config, prompts=PROMPTS, reward_fn=my_reward)
    assert shown(raised.value)[:4] == [here, "called", "called", "train"]


def test_a_check_of_the_arguments_shows_no_frames_of_the_library_and_a_defect_shows_all(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="needs reward_fn") as raised:
        trlx.train(config=tiny_config(tmp_path, "PPO"))
    assert len(shown(raised.value)) == 1
    monkeypatch.setattr("trlx.api.as_list", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        trlx.train(config=tiny_config(tmp_path, "PPO"), **DATA["PPO"])
    assert shown(raised.value)[1:4] == ["called", "called", "train"] and shown(raised.value)[-1] == "<lambda>"
