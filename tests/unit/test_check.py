"""``trlx check``, and what every run checks before its first step."""

import json
import logging
from types import SimpleNamespace

import pytest

from tests.unit.test_cli_train import folder  # noqa: F401, a fixture
from trlx import checkpoint
from trlx.launch import check as checks
from trlx.launch import made
from trlx.launch.check import check
from trlx.launch.cli import main
from trlx.launch.job import Job
from trlx.presets import load_preset
from trlx.run import checks as at_start
from trlx.run.checks import GIB, Finding, checkpoint_size, disk
from trlx.strict import ConfigError

REWARDS = """
def constant(outputs, label):
    return [0.5 * (number > 0) for number in label]
def broken(outputs):
    return 1 / 0
def one(outputs):
    return [1.0]
def nothing(outputs):
    return [float("nan")] * len(outputs)
def lengths(outputs):
    return {"length": [len(output) for output in outputs]}
"""


@pytest.fixture
def here(folder, monkeypatch):  # noqa: F811
    """The current folder, with rewards and prompts, where no run is planned."""

    def unplanned(*_):
        raise ConfigError("it is not asked for")

    monkeypatch.setattr(checks, "Planner", lambda *_: unplanned)
    (folder / "referees.py").write_text(REWARDS)
    letters = [{"prompt": "a" * length, "label": length} for length in range(1, 21)]
    (folder / "letters.json").write_text(json.dumps(letters))
    (folder / "chats.json").write_text(json.dumps([{"prompt": [{"role": "user", "content": "Hi"}]}]))
    return folder


def found(*words, draw=False, **options):
    return check(Job("train", list(words), model="tiny", **options), draw=draw)


def said(report, level):
    return [f"{finding.about}: {finding.says}" for finding in report.findings if finding.level == level]


@pytest.mark.parametrize(
    ("words", "options", "error"),
    [
        (
            "ppo",
            {"reward": "referees:broken"},
            "reward: reward_fn raised ZeroDivisionError: division by zero; first sam",
        ),
        ("grpo", {"reward": "referees:one"}, "reward: reward_fn returned 1 entries for 4 samples"),
        ("rft", {"reward": "referees:nothing"}, "reward: reward_fn returned nan, which is not finite, for sample 0"),
        ("ppo", {"prompts": "chats.json"}, "data: Prompt 0 is a list of messages, but the tokenizer has no chat templ"),
        ("ppo train.seq_length=40", {}, "data: train.seq_length (40) leaves no room for a prompt"),
        (
            "dpo train.batch_size=3 train.minibatch_size=3",
            {},
            "model: train.batch_size is 3, but this trainer keeps 2 rows together",
        ),
        ("sft train.seq_length=2048", {}, "model: train.seq_length is 2048, but the model has positions for 1024 tok"),
        ("ppo optimizer.kwargs.weight=1", {}, "model: Unknown key 'optimizer.kwargs.weight'. Did you mean"),
        ("pop", {}, "settings: Unknown preset 'pop'. Did you mean 'ppo'?"),
    ],
)
def test_what_would_fail_is_an_error(here, words, options, error):
    report = found(*words.split(), **options)
    (only,) = said(report, "error")
    assert only.startswith(error) and not report.is_good
    assert not (here / "ckpts").exists()


def test_lengths_batches_and_scores_are_told(here):
    words = (
        "ppo train.seq_length=30 method.gen_kwargs.max_new_tokens=14 method.num_rollouts=16 train.rollout_logging_dir=r"
    )
    report = found(*words.split(), prompts="letters.json", reward="referees:constant", metric="referees:lengths")
    assert said(report, "error") == []
    warnings = said(report, "warning")
    assert [line.partition(":")[0] for line in warnings] == ["batches", "data", "reward"]
    assert "4 of 20 prompts were longer than 16 tokens" in warnings[1]
    assert warnings[0] == "batches: A step asks for 32 rows, but a collection has 16: lower train.batch_size"
    assert warnings[2] == "reward: All 4 have the score 0.5: equal scores do not say which are better"
    notes = said(report, "note")
    tokens = "tokens: median 10, 95 % have at most 19, the longest 20; 16 fit beside 14 new tokens"
    assert f"prompts: 20 prompts; {tokens}" in notes
    assert "memory: There is no plan: it is not asked for" in notes
    assert [row["length"] for row in report.samples] == [len(row["output"]) for row in report.samples]
    assert [row["prompt"] for row in report.samples] == ["a", "aa", "aaa", "aaaa"]
    assert {row["reward"] for row in report.samples} == {0.5}
    assert not list(here.glob("r")) and not list(here.glob("ckpts"))


@pytest.mark.parametrize("method", ["sft", "ilql", "kto", "reward"])
def test_samples_are_counted_before_they_are_cut(here, method):
    new = [] if method == "reward" else ["method.gen_kwargs.max_new_tokens=2"]
    report = found(method, "train.seq_length=24", *new)
    assert said(report, "error") == []
    (line,) = [line for line in said(report, "note") if line.startswith("samples:")]
    assert "24 fit (train.seq_length)" in line and int(line.partition("the longest ")[2].split(";")[0]) > 24
    assert any("cut" in line for line in said(report, "warning"))


def test_samples_of_the_model_are_drawn_if_asked_for(here):
    few = ["ppo", "method.gen_kwargs.max_new_tokens=3", "method.gen_kwargs.min_new_tokens=3"]
    drawn, stand_ins = found(*few, draw=True), found(*few, stop=["we"])
    assert any("samples of the model" in line for line in said(drawn, "note"))
    outputs = [[row["output"] for row in report.samples] for report in (drawn, stand_ins)]
    assert outputs[1] == ["Th", "wo", "", "fa"] and outputs[0] != outputs[1]


def test_a_megatron_run_is_checked_without_its_processes(here, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(here)
    words = ["ppo", "train.trainer=NeMoPPOTrainer", "train.trainer_kwargs.tensor_model_parallel_size=2"]
    report = check(Job("train", words, model="tiny"), processes=4)
    assert said(report, "error") == []
    assert any("64 rows, 32 on each of 2 data ranks" in line for line in said(report, "note"))
    report = check(Job("train", [*words[:2], f"{words[2][:-1]}3"], model="tiny"))
    assert any(line.startswith("memory: ") and "3" in line for line in said(report, "error"))


def test_the_plan_is_compared_with_the_device(here, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(here)
    notes = said(check(Job("train", ["sft"], model="tiny")), "note")
    (line,) = [line for line in notes if line.startswith("memory: ")]
    assert "The phase update takes 0." in line and "this machine, without a GPU, has" in line
    free(monkeypatch, 0)
    for share, level, words in (
        (0.5, "error", "trlx plan sft names settings that"),
        (1.05, "warning", "leave a tenth"),
    ):
        size = float(line.split("takes ")[1].split()[0]) * GIB * share
        monkeypatch.setattr(checks, "_device", lambda *_, size=size: ("this GPU", size, "error"))
        report = check(Job("train", ["sft"], model="tiny"))
        assert any(words in found for found in said(report, level))
        assert any("GiB, and 0.00 are free at" in found for found in said(report, "error"))


def test_what_an_earlier_run_left_is_told_and_what_a_resume_would_change(here):
    config = load_preset("sft").to_json()
    config["optimizer"]["kwargs"]["lr"] = 0.5
    run = {
        "backend": "AccelerateBackend",
        "config": config,
        "model": "m",
        "schedule": "",
        "data": "",
        "data_processes": 1,
    }
    (here / "run" / "checkpoint_3").mkdir(parents=True)
    checkpoint.write_state(here / "run" / "checkpoint_3", {"schedule": {"step": 3}}, run)
    (stale,) = [line for line in said(found("sft", out="run"), "warning") if line.startswith("folder")]
    assert stale.startswith("folder: run holds another run at step 3, whose files will move to a subfolder")
    assert "--resume" in stale
    report = found("sft", out="run", resume=True)
    assert "folder: The run goes on from run/checkpoint_3, after step 3" in said(report, "note")
    changed = "\n".join(said(report, "warning"))
    assert "config.optimizer.kwargs.lr: 0.5 then" in changed and "data: '' then" in changed
    assert "model:" not in changed
    more = check(Job("train", ["sft"], model="tiny", out="run", resume=True, metric="referees:lengths"), processes=2)
    assert "data_processes: 1 then, 2 now" in "\n".join(said(more, "warning"))
    refused = said(found("ilql", out="run", resume=True), "error")
    assert refused[0].startswith("folder: The checkpoint cannot be resumed, because it belongs to another method")


def test_the_command_prints_a_table_or_json_and_its_code_is_2_for_an_error(here, capsys):
    assert main(["check", "sft", "--model", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "Findings\n" in printed and "samples" in printed and "0 errors, 1 warning, " in printed
    assert main(["check", "ppo", "--model", "tiny", "--reward", "referees:one", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["good"] is False and told["samples"] == []
    assert [each["about"] for each in told["findings"] if each["level"] == "error"] == ["reward"]


def test_a_template_that_cannot_be_used_and_one_that_is_not_used_are_told(here, monkeypatch):
    tokenizer = made.byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    monkeypatch.setattr(made, "byte_tokenizer", lambda ends_texts: tokenizer)
    report = found("ppo")
    assert any("cannot write a greeting" in line and "no users" in line for line in said(report, "warning"))
    assert any("has a chat template, which texts do not use" in line for line in said(report, "note"))


def free(monkeypatch, size):
    monkeypatch.setattr(at_start.shutil, "disk_usage", lambda _: SimpleNamespace(free=size * GIB))


def test_checkpoints_must_fit_on_the_disk(monkeypatch, tmp_path):
    every = [f"train.checkpoint_dir={tmp_path}/a/b", "train.checkpoint_interval=10", "train.keep_checkpoints=null"]
    train = load_preset("sft", overrides=every).train
    free(monkeypatch, 44)  # ten checkpoints and the best one
    assert list(disk(train, 4 * GIB, 100)) == []
    free(monkeypatch, 43)
    (found,) = disk(train, 4 * GIB, 100)
    assert found.level == "warning" and f"43.00 are free at {tmp_path}, but up to 11 are there at once" in found.says
    assert "write train.keep_checkpoints=8" in found.says  # 10 fit: the best one, and one that is written
    kept = load_preset("sft", overrides=[*every, "train.keep_checkpoints=8"]).train
    assert list(disk(kept, 4 * GIB, 100)) == []
    (found,) = disk(train, 44 * GIB, 100)
    assert found.level == "error"


def test_a_checkpoint_holds_averages_and_the_model_or_an_adapter_alone():
    sft = load_preset("sft")
    assert checkpoint_size(sft, 10, 100) == 10 * 4 * 3 + 110 * 4
    assert checkpoint_size(sft.evolve(train={"save_optimizer": False}), 10, 100) == 10 * 4 + 110 * 4
    lora = sft.evolve(model={"peft_config": {"peft_type": "LORA"}, "model_extra_configs": {"dtype": "bfloat16"}})
    assert checkpoint_size(lora, 10, 100) == 10 * 4 * 3 + 10 * 4


def test_packages_outside_their_ranges_are_told_with_what_to_type(monkeypatch):
    asked = [
        "torch<2.14,>=2.8",
        "gone>=1",
        'peft>=0.18; extra == "peft"',
        'no>=1; extra == "no"',
        'pin==1; extra == "x"',
    ]
    has = {"torch": "2.7", "peft": "0.18", "pin": "2"}
    monkeypatch.setattr(at_start.importlib.metadata, "requires", lambda _: asked)

    def version(name):
        if name not in has:
            raise at_start.importlib.metadata.PackageNotFoundError(name)
        return has[name]

    monkeypatch.setattr(at_start.importlib.metadata, "version", version)
    first, second = at_start.versions.__wrapped__()
    assert first.says == (
        "torch 2.7 is installed, and trlx is made for torch<2.14,>=2.8: pip install 'torch<2.14,>=2.8'"
    )
    assert second.says == "gone is not installed: pip install 'gone>=1'"


def test_a_run_logs_what_is_found_and_nothing_else(monkeypatch, caplog, tmp_path):
    config = load_preset("sft", overrides=[f"train.checkpoint_dir={tmp_path}"])
    counts = SimpleNamespace(parameter_counts=lambda: (10, 0))
    trainer = SimpleNamespace(config=config, backend=counts, total_steps=10)
    monkeypatch.setattr(at_start, "versions", lambda: [])
    at_start.at_start(trainer)
    assert caplog.messages == []
    monkeypatch.setattr(at_start, "versions", lambda: [Finding("warning", "versions", "old")])
    free(monkeypatch, 0)
    with caplog.at_level(logging.WARNING):
        at_start.at_start(trainer)
    assert caplog.messages[0] == "old" and "free some" in caplog.messages[1]
