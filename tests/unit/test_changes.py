"""A run that goes on with other settings does what they say, or warns of what it does instead, or refuses."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from tests import runs
from tests.runs import TEXTS, metrics, run, tiny_config, weights
from trlx import checkpoint
from trlx.data.store import RolloutStore
from trlx.run.changes import ADAPTED, EXACT, REFUSED, changes, identity, keeps_averages
from trlx.trainer import schedule

AUTO = {"resume_from_checkpoint": "auto"}


def identity_of(**changes):
    """What identifies a tiny run."""
    config = tiny_config("somewhere", "PPO", **changes).to_json()
    config["model"]["model_path"] = "a/model"
    others = {"backend": "AccelerateBackend", "model": "m", "data": "d", "data_processes": 1, "schedule": ""}
    return {"config": config, **others}


def test_what_changes_no_number_is_not_mentioned():
    now = identity_of()
    for name in EXACT:
        _, section, key = name.split(".")
        assert key in now["config"][section], f"{name} is no setting"
        now["config"][section][key] = "another"
    assert changes(identity_of(), now) == []


def test_every_other_change_is_mentioned_with_what_is_done_about_it():
    before = identity_of()
    for name, text in ADAPTED.items():
        now = copy.deepcopy(before)
        *path, key = name.split(".")
        place = now
        for part in path:
            place = place[part]
        assert key in place, f"{name} is no setting"
        place[key] = "another" if not isinstance(place.get(key), dict) else {**place[key], "kwargs": {"lr": 0.5}}
        found = changes(before, now)
        assert found and all(line.endswith(f" now: {text}") for line in found), name
    line = f"config.method.gamma: 1.0 then, 0.5 now: {ADAPTED['config.method']}"
    assert changes(before, identity_of(method={"gamma": 0.5})) == [line]
    line = "config.train.seq_length: 16 then, 20 now: numbers will not be the interrupted run's"
    assert changes(before, identity_of(train={"seq_length": 20})) == [line]


def test_a_sampler_is_the_same_however_it_is_written():
    backend = SimpleNamespace(fingerprint="", lr_schedule="", data_size=1)

    def sampler(written):
        return identity(tiny_config("somewhere", "SFT", train={"sampler": written}), backend, "")

    for written in ({"engine": "auto"}, {}):
        assert changes(sampler("auto"), sampler(written)) == []
    what = ADAPTED["config.train.sampler"]
    assert changes(sampler("auto"), sampler({"places": 2})) == [
        f"config.train.sampler.places: None then, 2 now: {what}"
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_of_another_method_or_backend_is_refused(name):
    now = identity_of()
    if name == "backend":
        now["backend"] = "MegatronBackend"
    else:
        now["config"]["method"]["name"] = "SFTConfig"
    with pytest.raises(
        ValueError, match=rf"cannot be resumed, because .*{REFUSED[name]} \({name}: .* write its path as"
    ):
        changes(identity_of(), now)


def test_running_averages_go_on_in_an_optimizer_of_the_same_kind():
    def kept(then, now, **kwargs):
        return keeps_averages(
            identity_of(optimizer={"name": then}), identity_of(optimizer={"name": now, "kwargs": kwargs})
        )

    assert kept("adam", "adamw") and kept("adam_8bit_bnb", "adamw_8bit_bnb") and kept("sgd", "sgd", lr=1.0)
    assert not kept("adamw", "sgd") and not kept("adamw", "adamw_8bit_bnb") and not kept("adam", "adam", amsgrad=True)
    (_, averages) = changes(identity_of(), identity_of(optimizer={"name": "sgd"}))
    assert averages == "the optimizer's running averages start anew"
    (averages,) = changes(identity_of(train={"save_optimizer": False}), identity_of())
    assert averages == "train.save_optimizer was false then: the optimizer's running averages start anew"


@pytest.fixture
def rows_read(monkeypatch):
    """The rows of every batch, where each pass reads them from the last to the first."""
    read = []
    monkeypatch.setattr(schedule, "pass_order", lambda num_rows, seed, number, together: tuple(range(num_rows))[::-1])
    rows = RolloutStore.rows
    monkeypatch.setattr(RolloutStore, "rows", lambda store, index: (read.append(list(index)), rows(store, index))[1])
    return read


def test_another_batch_size_goes_on_at_the_next_row(tmp_path, rows_read, caplog):
    # eight texts
    run("SFT", tmp_path, train={"total_steps": 1, "batch_size": 4})
    run("SFT", tmp_path, train={"total_steps": 4, "batch_size": 2, **AUTO})
    run("SFT", tmp_path, train={"total_steps": 5, "batch_size": 3, **AUTO})
    run("SFT", tmp_path, train={"total_steps": 7, "batch_size": 6, **AUTO})
    state = checkpoint.read_state(checkpoint.newest(tmp_path))[0]["schedule"]
    assert rows_read == [[7, 6, 5, 4], [3, 2], [1, 0], [7, 6], [5, 4, 3], [2, 1, 0], [7, 6, 5, 4, 3, 2]]
    assert (state["epoch"], state["passes"], state["rows_done"]) == (2, 2, 6)
    assert "config.train.batch_size: 4 then, 2 now: the present pass goes on at its next row" in caplog.text


def test_other_data_start_the_pass_anew(tmp_path, rows_read, monkeypatch):
    run("SFT", tmp_path, train={"total_steps": 1})
    monkeypatch.setitem(runs.DATA, "SFT", {"samples": TEXTS[:5], "eval_prompts": ["ab"]})
    trainer = run("SFT", tmp_path, train={"total_steps": 3, **AUTO})
    assert rows_read == [[7, 6, 5, 4], [4, 3, 2, 1], [0]]
    assert (trainer.schedule.epoch, trainer.schedule.rows_done) == (1, 0)


def test_other_prompts_are_mentioned_and_drawn_from_in_the_next_collection(tmp_path, monkeypatch, caplog):
    run("PPO", tmp_path, train={"total_steps": 1})
    monkeypatch.setitem(runs.DATA, "PPO", {**runs.ONLINE, "prompts": ["zz"]})
    trainer = run("PPO", tmp_path, train={"total_steps": 5, **AUTO})
    assert ADAPTED["data"] in caplog.text
    # steps 2 to 4 are on the old rollouts, step 5 on new ones
    assert trainer.stream.position == 16
    assert {tuple(row[:2].tolist()) for row in trainer.store.tokens} == {(29, 29)}


# two steps are a pass over the eight rollouts of a collection; five steps in are two passes and a half
@pytest.mark.parametrize(
    ("ppo_epochs", "position", "collections"),
    [(1, (1, 0, 4), 2), (2, (1, 0, 4), 2), (3, (1, 0, 0), 1), (4, (0, 3, 0), 1), (6, (0, 3, 0), 1)],
)
def test_a_collection_gets_as_many_passes_as_the_new_ppo_epochs_say(tmp_path, ppo_epochs, position, collections):
    run("PPO", tmp_path, method={"ppo_epochs": 4}, train={"total_steps": 5})
    trainer = run("PPO", tmp_path, method={"ppo_epochs": ppo_epochs}, train={"total_steps": 6, **AUTO})
    schedule = trainer.schedule
    assert (schedule.epoch, schedule.inner_epoch, schedule.rows_done) == position
    assert trainer.stream.position == 8 * collections


def test_rollouts_of_another_temperature_are_not_trained_on(tmp_path):
    run("PPO", tmp_path, train={"total_steps": 1})
    # for the rollouts in hand the ratio would be far from 1
    trainer = run("PPO", tmp_path, method={"gen_kwargs": {"temperature": 3.0}}, train={"total_steps": 2, **AUTO})
    last = [line for line in metrics(tmp_path) if "ratio/mean" in line or "policy/ratio_deviation/max" in line][-1]
    assert last["policy/ratio_deviation/max"] < 1e-5 and trainer.stream.position == 16
    assert (trainer.schedule.epoch, trainer.schedule.rows_done) == (0, 4)


SGD = {"name": "sgd", "kwargs": {"lr": 0.01, "momentum": 0.9}}
CONSTANT = {"name": "constant", "kwargs": {"T_max": None, "eta_min": None}}


def rate(folder):
    """The learning rate of the last step."""
    return [line["learning_rate_group_0"] for line in metrics(folder) if "learning_rate_group_0" in line][-1]


def test_the_learning_rate_goes_on_where_the_run_is_by_the_settings_of_now(tmp_path, caplog):
    # cosine: 1e-4 + (lr - 1e-4) (1 + cos(pi n / 50)) / 2, of which the last factor is 0.991144 at n = 3 steps done
    run("SFT", tmp_path / "without", train={"total_steps": 3, "save_optimizer": False})
    run("SFT", tmp_path / "without", train={"total_steps": 4, **AUTO})
    assert rate(tmp_path / "without") == pytest.approx(2.974317e-3, abs=1e-8)
    assert "train.save_optimizer was false then" in caplog.text
    for name, changed, expected in [
        ("lr", {"optimizer": {"kwargs": {"lr": 1e-2, "weight_decay": 0.25}}}, 9.912322e-3),
        ("schedule", {"scheduler": {"name": "linear", "kwargs": {"T_max": None, "eta_min": None}}}, 2.2e-3),
    ]:
        run("SFT", tmp_path / name, train={"total_steps": 3})
        trainer = run("SFT", tmp_path / name, train={"total_steps": 4, **AUTO}, **changed)
        assert rate(tmp_path / name) == pytest.approx(expected, abs=1e-8)
        (group,) = trainer.backend.sharding.optimizer.param_groups
        assert group["weight_decay"] == (0.25 if name == "lr" else 0.01)


@pytest.mark.parametrize("then", [{"train": {"save_optimizer": False}}, {"optimizer": SGD}])
def test_running_averages_that_start_anew_make_a_first_step_of_adam(tmp_path, then):
    # the first step moves every weight that has a gradient by the learning rate, 0.01; a later one moves it by less
    same = {
        "model": {"num_layers_unfrozen": 1},
        "scheduler": {"name": "constant", "kwargs": {"T_max": None, "eta_min": None}},
    }
    kwargs = {"optimizer": {"kwargs": {"lr": 0.01}}}
    for name, changed in (("anew", then), ("kept", {})):
        merged = {**kwargs, **changed, "train": {"total_steps": 2, **changed.get("train", {})}}
        run("SFT", tmp_path / name, **same, **merged)
        before = weights(tmp_path / name)
        now = {"optimizer": {"kwargs": {"lr": 0.01, "weight_decay": 0.0}}}
        run("SFT", tmp_path / name, **same, **now, train={"total_steps": 3, **AUTO})
        after = weights(tmp_path / name)
        moved = torch.cat([(after[weight] - before[weight]).abs().flatten() for weight in before])
        moved = moved[moved > 0]
        assert (float(moved.median()) == pytest.approx(0.01, abs=1e-5)) == (name == "anew")


def test_a_loss_scale_is_restored_and_running_averages_are_forgotten_where_asked_or_not_saved(tmp_path):
    backend = run("SFT", tmp_path, train={"total_steps": 1}).backend
    for scale in (128.0, 4.0):
        backend.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        if scale == 128.0:
            backend.save(tmp_path)
    backend.load(tmp_path)
    assert backend.accelerator.scaler.get_scale() == 128.0
    backend.accelerator.scaler = None
    weights_alone = tmp_path / "weights alone"
    weights_alone.mkdir()
    backend.save(weights_alone, optimizer=False)
    for folder, optimizer in ((tmp_path, False), (weights_alone, True)):
        backend.load(tmp_path)
        assert backend.sharding.optimizer.state
        backend.load(folder, optimizer=optimizer)
        assert not backend.sharding.optimizer.state
    backend.save(tmp_path)
    assert json.loads((tmp_path / "updates.json").read_text()) == {"step_count": 1, "scaler": None}


def test_a_ppo_run_goes_on_with_many_things_changed(tmp_path, caplog):
    run("PPO", tmp_path, method={"target": None, "scale_reward": "ref"}, train={"total_steps": 3})
    changed = {
        "method": {
            "target": None,
            "scale_reward": "ref",
            "init_kl_coef": 0.3,
            "ref_std": 2.0,
            "num_rollouts": 6,
            "chunk_size": 3,
        },
        "train": {"minibatch_size": 2, "max_grad_norm": 0.5, "seed": 5, "batch_size": 2},
    }
    trainer = run("PPO", tmp_path, **{**changed, "train": {**changed["train"], "total_steps": 8, **AUTO}})
    lines = [line for line in metrics(tmp_path) if "kl_ctl_value" in line]
    # two rows of the second pass over the first eight rollouts were left for steps 4 and 5
    assert [(line["step"], line["kl_ctl_value"]) for line in lines] == [(1, 0.05), (6, 0.3)]
    assert (len(trainer.store), trainer.stream.position, trainer.scale.first_std) == (6, 14, 2.0)
    for section, settings in changed.items():
        for name in settings.keys() - {"target", "scale_reward"}:
            assert f"config.{section}.{name}: " in caplog.text
