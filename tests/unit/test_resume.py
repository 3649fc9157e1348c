"""Runs that stop, go on, go on with other settings, or start in a folder that holds a run."""

import logging

import pytest

from tests.runs import PROMPTS, TEXTS, metrics, run, tiny_config
from trlx import checkpoint
from trlx.api import train as learn
from trlx.presets import load_preset


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(folder):
    return [line["step"] for line in metrics(folder) if "grad_norm" in line]


def test_save_deletes_nothing_but_a_checkpoint(tmp_path):
    trainer = run("SFT", tmp_path / "run", train={"total_steps": 1})
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match="name a new folder"):
        trainer.save(tmp_path / "run")
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before
    for _ in range(2):  # a new folder, then the checkpoint there
        trainer.save(tmp_path / "saved")
    assert checkpoint.read_state(tmp_path / "saved")[0]["schedule"]["step"] == 1


def rewards_of(values):
    """A metric that gives these rewards, one an evaluation."""
    values = iter(values)
    return lambda samples, **kwargs: {"reward": next(values)}


def sft(folder, rewards, **train):
    """Three steps with an evaluation at each, whose rewards are given."""
    changes = {"total_steps": 3, "eval_interval": 1, "checkpoint_interval": None, **train}
    config = tiny_config(folder, "SFT", train=changes)
    return learn(samples=TEXTS, eval_prompts=PROMPTS[:2], metric_fn=rewards_of(rewards), config=config)


FILES = ["config.json", "environment.jsonl", "metrics.jsonl", "report.html", "samples"]
WRITTEN = [".lock", "best_checkpoint", "checkpoint_1", "checkpoint_2", "checkpoint_3", *FILES]


def test_a_run_in_the_folder_of_another_one_sets_everything_aside_and_says_how_to_go_on_from_it(tmp_path, caplog):
    sft(tmp_path, [0.0, 3.0, 1.0, 2.0])
    assert names(tmp_path) == WRITTEN
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint_7").mkdir()  # what is named like a checkpoint would be written over as well
    old = (tmp_path / "metrics.jsonl").read_text()
    sft(tmp_path, [0.0, 1.0], total_steps=1)
    aside = tmp_path / "earlier.1"
    assert names(tmp_path) == sorted([*WRITTEN[:3], *FILES, "earlier.1", "notes.txt"])
    assert names(aside) == sorted([*WRITTEN[1:], "checkpoint_7"])
    assert checkpoint.read_state(aside / "best_checkpoint")[0]["best"][0] == 3.0
    assert (aside / "metrics.jsonl").read_text() == old and len(metrics(tmp_path)) == 3
    assert checkpoint.read_state(tmp_path / "best_checkpoint")[0]["best"][0] == 1.0
    said = f"What an earlier run left in {tmp_path}: now in {aside}; to go on from there, set "
    assert said + f"train.resume_from_checkpoint: {aside / 'checkpoint_3'}" in caplog.text
    # and so it goes: the second run is set aside in its turn
    sft(tmp_path, [5.0], total_steps=4, resume_from_checkpoint=str(aside))
    assert names(tmp_path / "earlier.2") == [*WRITTEN[1:3], *FILES]
    assert steps(tmp_path) == [4] and names(aside) == sorted([*WRITTEN[1:], "checkpoint_7"])


def test_a_run_that_goes_back_sets_aside_what_came_later(tmp_path, caplog):
    sft(tmp_path, [0.0, 1.0, 2.0, 3.0])
    sft(tmp_path, [1.5, 1.6], resume_from_checkpoint=str(tmp_path / "checkpoint_1"))
    aside = tmp_path / "earlier.1"
    assert names(aside) == ["best_checkpoint", "checkpoint_2", "checkpoint_3"]
    assert f"Checkpoints of later steps than 1 in {tmp_path}: now in {aside}" in caplog.text
    assert names(tmp_path) == sorted([*WRITTEN, "earlier.1", "metrics.abandoned.jsonl"])
    assert steps(tmp_path) == [1, 2, 3]
    assert checkpoint.read_state(tmp_path / "best_checkpoint")[0]["best"][0] == 1.6


def test_a_best_checkpoint_is_not_lost_to_a_worse_one_of_steps_that_are_repeated(tmp_path):
    # killed after the evaluation of step 2 and before its checkpoint
    sft(tmp_path, [0.0, 1.0, 3.0], total_steps=2)
    checkpoint.remove(tmp_path / "checkpoint_2")
    sft(tmp_path, [2.0, 2.5], resume_from_checkpoint="auto")
    state, _ = checkpoint.read_state(tmp_path / "best_checkpoint")
    assert (state["schedule"]["step"], state["best"][0]) == (2, 3.0)
    assert steps(tmp_path) == [1, 2, 3] and not (tmp_path / "earlier.1").exists()


def test_the_best_reward_is_remembered_also_where_no_best_checkpoint_is_kept(tmp_path):
    sft(tmp_path, [0.0, 3.0, 1.0], total_steps=2, save_best=False)
    trainer = sft(tmp_path, [2.0], save_best=False, resume_from_checkpoint="auto")
    assert (trainer.best_reward, trainer.best_step) == (3.0, 1)


def test_a_run_saves_at_every_evaluation_and_keeps_as_many_as_asked(tmp_path):
    train = {"total_steps": 5, "eval_interval": 2, "keep_checkpoints": 2}
    sft(tmp_path, [0.0, 9.0, 1.0, 1.0], **train)
    assert names(tmp_path)[:4] == [".lock", "best_checkpoint", "checkpoint_4", "checkpoint_5"]
    # what a kill left behind goes at the next start
    for leftover in (".checkpoint_4.writing", ".checkpoint_2.x.removed", ".best_checkpoint.replaced"):
        (tmp_path / leftover).mkdir()
    sft(tmp_path, [1.0, 1.0], **{**train, "total_steps": 6}, resume_from_checkpoint="auto")
    assert names(tmp_path)[:5] == [".lock", "best_checkpoint", "checkpoint_5", "checkpoint_6", "config.json"]
    assert checkpoint.read_state(tmp_path / "best_checkpoint")[0]["schedule"]["step"] == 2


def test_what_the_optimizer_keeps_is_saved_unless_that_is_switched_off(tmp_path):
    for saves in (True, False):
        sft(tmp_path / str(saves), [0.0, 1.0], total_steps=1, save_optimizer=saves)
        files = names(tmp_path / str(saves) / "checkpoint_1")
        assert ("optimizer.safetensors" in files) == saves
    sft(tmp_path / "False", [1.0, 1.0], resume_from_checkpoint="auto")
    assert steps(tmp_path / "False") == [1, 2, 3]


@pytest.mark.parametrize("name", ["ppo", "ilql", "sft", "rft", "randomwalks", "randomwalks-ilql", "trlx-2024"])
def test_a_run_of_any_preset_loses_no_more_than_an_evaluation_interval(name):
    train = load_preset(name).train
    assert (train.checkpoint_interval, train.keep_checkpoints) == (None, 3)
    assert train.eval_interval <= 1000 and 2 * train.eval_interval < train.total_steps


def test_a_folder_that_does_not_exist_yet_is_resumed_as_auto_is(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="trlx")
    again = {"resume_from_checkpoint": str(tmp_path / "run")}
    sft(tmp_path / "run", [0.0, 1.0], total_steps=1, **again)
    assert f"No checkpoint under {tmp_path / 'run'}: starting afresh" in caplog.text
    sft(tmp_path / "run", [1.0, 1.0], **again)
    assert steps(tmp_path / "run") == [1, 2, 3] and not (tmp_path / "run" / "earlier.1").exists()


def test_steps_that_changed_nothing_are_counted_on_in_a_resumed_run(tmp_path):
    trainer = run("SFT", tmp_path, train={"total_steps": 1})
    trainer.guards.memory["skipped_steps"] = 3
    trainer.save(tmp_path / "saved")
    run("SFT", tmp_path, train={"total_steps": 2, "resume_from_checkpoint": str(tmp_path / "saved")})
    assert [line["skipped_steps"] for line in metrics(tmp_path) if "grad_norm" in line] == [0, 3]


def test_what_is_trained_on_is_collected_again_after_a_load(tmp_path, monkeypatch):
    trainer = run("SFT", tmp_path, train={"total_steps": 1})
    collected = []
    monkeypatch.setattr(trainer, "collect", lambda: collected.append(trainer.schedule.rows_done) or trainer.samples)
    trainer.load(tmp_path / "checkpoint_1")
    trainer.config.train.total_steps = 2
    trainer.learn()
    assert collected == [4]  # in the middle of a pass


def test_offline_too_every_epoch_trains_on_what_is_collected_at_its_beginning(tmp_path, monkeypatch):
    trainer = run("SFT", tmp_path, train={"total_steps": 0})
    collected = []
    monkeypatch.setattr(trainer, "collect", lambda: collected.append(trainer.schedule.step) or trainer.samples)
    trainer.config.train.total_steps = 5
    trainer.learn()
    assert collected == [0, 2, 4]  # two batches of the eight texts are an epoch


def test_learning_twice_goes_on(tmp_path):
    trainer = sft(tmp_path, [0.0, 1.0, 2.0, 3.0, 0.5], total_steps=2)
    trainer.config.train.total_steps = 3
    trainer.learn()
    assert steps(tmp_path) == [1, 2, 3] and not (tmp_path / "earlier.1").exists()
    assert not (tmp_path / "metrics.abandoned.jsonl").exists()
    trainer.learn()
    assert steps(tmp_path) == [1, 2, 3]
    trainer.load(tmp_path / "checkpoint_2")
    trainer.learn()
    assert steps(tmp_path) == [1, 2, 3] and names(tmp_path / "earlier.1") == ["best_checkpoint", "checkpoint_3"]


def test_learning_goes_on_from_a_checkpoint_of_another_folder_if_anything_is_left_to_learn(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="trlx")
    mine, other = tmp_path / "mine", tmp_path / "other"
    sft(other, [0.0, 1.0, 2.0, 3.0])
    trainer = sft(mine, [0.0, 1.0, 2.0, 3.0, 0.5])
    trainer.load(other / "checkpoint_3")
    trainer.learn()
    assert "Nothing is left to learn" in caplog.messages[-1] and names(mine) == WRITTEN
    trainer.load(other / "checkpoint_2")
    trainer.learn()
    said = caplog.messages[-1].splitlines()
    assert said[0].startswith("Done: step 3")
    # nothing of other's best checkpoint is here
    assert said[1:] == ["  best     reward 2 at step 2", f"  weights  {mine / 'checkpoint_3' / 'hf_model'}"]
    assert "checkpoint_3" in names(mine / "earlier.1") and "earlier.1" not in names(other)
    trainer.load(other / "checkpoint_2")
    assert trainer.saved == (other / "checkpoint_2", 2)


def test_what_is_saved_after_training_goes_on_in_the_same_file_of_metrics(tmp_path):
    sft(tmp_path, [0.0, 1.0], total_steps=1).save(tmp_path / "saved")
    sft(tmp_path, [2.0, 3.0], resume_from_checkpoint=str(tmp_path / "saved"))
    assert steps(tmp_path) == [1, 2, 3] and not (tmp_path / "earlier.1").exists()


def test_a_learn_that_was_stopped_at_once_and_is_called_again_loses_no_metrics(tmp_path, monkeypatch):
    trainer = sft(tmp_path, [0.0, 1.0, 4.0], total_steps=1, checkpoint_interval=10)
    trainer.config.train.total_steps = 3

    def stopped():
        raise KeyboardInterrupt

    with monkeypatch.context() as second_press, pytest.raises(KeyboardInterrupt):
        second_press.setattr(trainer, "evaluate", stopped)
        trainer.learn()
    assert steps(tmp_path) == [1, 2] and names(tmp_path)[2:4] == ["checkpoint_1", "config.json"]
    trainer.learn()
    assert steps(tmp_path) == [1, 2, 3] and not (tmp_path / "metrics.abandoned.jsonl").exists()


def test_a_run_whose_model_lies_in_its_own_folder_is_sent_to_another_one(tmp_path):
    run("SFT", tmp_path, train={"total_steps": 1})
    before = names(tmp_path)
    for model in ("checkpoint_1", "checkpoint_1/hf_model"):
        with pytest.raises(ValueError, match="set train.checkpoint_dir to another folder"):
            run("SFT", tmp_path, model={"model_path": str(tmp_path / model)})
    assert names(tmp_path) == before


def test_rollouts_saved_before_the_first_step_on_them_are_trained_on_and_not_drawn_anew(tmp_path, monkeypatch):
    from trlx.trainer.accelerate import AcceleratePPOTrainer

    ppo_loss = AcceleratePPOTrainer.loss

    def saving_loss(self, scores, batch):
        if not (tmp_path / "saved").exists():
            self.save(tmp_path / "saved")
        return ppo_loss(self, scores, batch)

    monkeypatch.setattr(AcceleratePPOTrainer, "loss", saving_loss)
    run("PPO", tmp_path / "whole", train={"total_steps": 2})
    changes = {"total_steps": 2, "resume_from_checkpoint": str(tmp_path / "saved")}
    trainer = run("PPO", tmp_path / "resumed", train=changes)
    assert trainer.stream.position == 8  # one collection of 8 prompts
    folders = (tmp_path / "whole", tmp_path / "resumed")
    losses = [[line["losses/total_loss"] for line in metrics(f) if "grad_norm" in line] for f in folders]
    assert losses[0] == losses[1] and len(losses[0]) == 2
