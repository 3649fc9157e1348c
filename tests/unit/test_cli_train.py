"""``trlx train`` and its short forms: what is typed becomes the arguments of `trlx.train`."""

import json
import sys
from types import SimpleNamespace

import pytest
import yaml

import trlx
from tests.unit.test_cli import failure
from trlx.launch import job as jobs
from trlx.launch.cli import main
from trlx.launch.made import rows
from trlx.launch.sources import function_of, read_rows
from trlx.presets import METHODS
from trlx.rewards.functions import RepetitionPenalty as SomeReward

ROWS = [{"question": "2 + 2 =", "answer": " 4"}, {"question": "1, 1 =", "answer": " 2"}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with files of rows and a module of rewards."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.csv").write_text('question,answer\n2 + 2 =, 4\n"1, 1 =", 2\n')
    (tmp_path / "rows.txt").write_text("2 + 2 =\n\n1, 1 =\n")
    (tmp_path / "judges.py").write_text(
        "def brief(outputs):\n    return [-len(output) for output in outputs]\ndef broken(outputs):\n    return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "judges", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def started(monkeypatch):
    """What a command gave to `trlx.train`, which trains nothing."""
    calls = []
    monkeypatch.setattr(trlx, "train", lambda **arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_file_of_each_kind_has_the_same_rows(kind, folder):
    if kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(ROWS), "rows.parquet")
    assert read_rows(f"rows.{kind}") == ROWS
    assert read_rows(f"rows.{kind}", ["prompt=question"])[1] == {"answer": " 2", "prompt": "1, 1 ="}


def test_a_line_of_a_text_file_is_a_row_and_a_name_is_a_data_set(folder, monkeypatch):
    assert read_rows("rows.txt", ["prompt=question"]) == ["2 + 2 =", "1, 1 ="]
    asked = []
    hub = SimpleNamespace(load_dataset=lambda *names, split: asked.append((*names, split)) or ROWS)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_rows("openai/gsm8k:main@test[:10]") == ROWS == read_rows("imdb")
    assert asked == [("openai/gsm8k", "main", "test[:10]"), ("imdb", None, "train")]


def test_columns_of_numbers_are_numbers_in_csv_files_too(folder):
    (folder / "labels.csv").write_text("\ufeffprompt,completion,label,score\n5,4,TRUE,0.5\n")  # as spreadsheets do
    row = {"prompt": "5", "completion": "4", "label": True, "reward": 0.5}
    assert read_rows("labels.csv", ["reward=score"]) == [row]
    (folder / "labels.csv").write_text("label\ngood\n")
    with pytest.raises(ValueError, match="The column 'label' must have numbers, or true and false, got 'good'"):
        read_rows("labels.csv")


@pytest.mark.parametrize(
    "source, columns, message",
    [
        ("nowhere.csv", [], "There is no file nowhere.csv in "),
        ("rows.csv", ["prompt=qestion"], "rows.csv has no column 'qestion'. Did you mean 'question'? It has: question"),
        ("rows.csv", ["prompt"], "--column takes KEY=COLUMN, such as prompt=question, got prompt"),
        ("broken.jsonl", [], "broken.jsonl, line 2, is not JSON: "),
        ("broken.json", [], "broken.json must be a JSON list of rows"),
        ("empty.txt", [], "empty.txt has no rows"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read_say_why(source, columns, message, folder):
    (folder / "broken.jsonl").write_text('{"a": 1}\n{"a": \n')
    (folder / "broken.json").write_text("{}")
    (folder / "empty.txt").write_text("\n")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_rows(source, columns)
    assert str(error.value).startswith(message)


def test_a_reward_is_a_function_a_class_a_server_or_a_model(folder):
    assert function_of("judges:brief", "--reward")(outputs=["abc"]) == [-3]
    assert function_of("judges.py:brief", "--reward")(outputs=["abcd"]) == [-4]
    assert isinstance(function_of("trlx.rewards.functions:RepetitionPenalty", "--reward"), SomeReward)
    assert function_of("made", "--reward")(samples=["aeb", "b"]) == [2 / 3, 0]
    assert function_of("http://judge:8000", "--reward").url == "http://judge:8000"
    with pytest.raises(OSError, match=r"No model at '\.', which is the reward model"):
        function_of(".", "--reward")
    for source, message in {
        "judges": "--reward is 'judges': write module:function, file.py:function, a folder",
        "judgse:brief": "--reward: there is no module judgse in ",
        "judgse.py:brief": "--reward: there is no file judgse.py in ",
        "judges:breif": r"--reward: judges has no function 'breif'. Did you mean 'brief'\?",
    }.items():
        with pytest.raises(ValueError, match=message):
            function_of(source, "--reward")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_tried_with_the_model_that_is_made(method, folder, capsys):
    assert main([method, "--model", "tiny", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"{method}config in accelerate{method}trainer, 1 process\n" in printed.lower()
    assert f" {len(rows(method))} from made, first " in printed and "4 steps at most" in printed
    assert not list(folder.glob("ckpts"))


def test_what_is_typed_reaches_train(folder, started):
    (folder / "mine.yaml").write_text("method: {gamma: 0.5, lam: 0.5}\ntrain: {seed: 3}\n")
    online = "--prompts rows.csv --column prompt=question --reward judges:brief --metric judges.py:brief --stop END"
    typed = f"ppo mine.yaml --model tiny {online} --eval-prompts rows.txt --out here --resume method.lam=0.25"
    assert main([*typed.split(), "train.total_steps=7"]) == 0
    (given,) = started
    method, train = given["config"].method, given["config"].train
    assert (method.gamma, method.lam, train.seed) == (0.5, 0.25, 3)
    assert (train.total_steps, train.eval_interval, train.tracker) == (7, 4, None)
    assert (train.checkpoint_dir, train.resume_from_checkpoint) == ("here", "auto")
    assert given["prompts"][0] == {"prompt": "2 + 2 =", "answer": " 4"}
    assert given["eval_prompts"] == ["2 + 2 =", "1, 1 ="] and given["stop_sequences"] == ["END"]
    assert given["reward_fn"](outputs=["a"]) == given["metric_fn"](outputs=["b"]) == [-1]


def test_rewards_stand_in_a_column_and_the_rows_choose_the_method(folder, started):
    scored = "--samples rows.csv --column prompt=question --column output=answer --column reward=score --model tiny"
    (folder / "rows.csv").write_text("question,answer,score\na,b,0.5\nc,d,1\n")
    assert main(["train", *scored.split()]) == 0
    assert main(["sft", *scored.split()]) == 0
    ilql, sft = started
    assert (ilql["config"].method.name, ilql["rewards"]) == ("ILQLConfig", [0.5, 1])
    assert sft["config"].method.name == "SFTConfig" and "rewards" not in sft
    assert {"prompt": "a", "output": "b"}.items() <= sft["samples"][0].items()


@pytest.mark.parametrize(
    "typed, said",
    [
        ("ppo", "trlx ppo: The method learns from rewards of its own samples: add --prompts and --reward, or try it"),
        ("sft --reward made", "trlx sft: The method learns from samples: leave out --reward\n"),
        ("ppo grpo --model tiny", "trlx ppo: The settings are of GRPOConfig, another method: write trlx grpo\n"),
        (
            "ppo --model tiny --tokenizer gpt2",
            "trlx ppo: --model tiny has a tokenizer of its own: leave out --tokenizer\n",
        ),
        ("grpo --samples made", "trlx grpo: The method learns from its own samples: leave out --samples\n"),
        ("dpo --samples rows.csv", "trlx dpo: rows.csv: Sample 0 must have chosen and rejected, got {'question'"),
        ("sft --samples rows.csv", "trlx sft: rows.csv: samples have the columns question, answer, and trlx knows no"),
        (
            "ppo --prompts rows.csv --reward made",
            "trlx ppo: rows.csv has the columns question, answer: write --column",
        ),
        ("ppo --processes 0", "trlx ppo: --processes must be at least 1, got 0\n"),
        ("train pop", "trlx train: Unknown preset 'pop'. Did you mean 'ppo'?"),
        ("train ppo train.sede=1", "trlx train: Unknown key 'train.sede'. Did you mean 'seed'?"),
        ("sft --samples rows.txt --model ./nowhere", "trlx sft: model.model_path is './nowhere', which does not exist"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_built(typed, said, folder, capsys, started):
    code, printed = failure(capsys, *typed.split())
    assert code == 2 and printed.startswith(said) and printed.count("\n") == 1
    assert started == []


def test_several_processes_are_the_same_command_under_torchrun(folder, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(jobs.os, "execv", lambda *command: ran.append(command))
    monkeypatch.setattr(jobs, "_train", lambda _: 0)
    typed = ["ppo", "train.seed=1", "--model", "tiny", "--stop", "a b", "--out", "here", "--resume"]
    assert main([*typed, "--processes", "2", "--dry-run"]) == 0 and ran == []
    assert "2 processes\n" in capsys.readouterr().out
    assert main([*typed, "--processes", "2"]) == 0
    ((program, words),) = ran
    assert program == sys.executable
    torchrun, command = words[1:6], words[6:]
    assert torchrun == ["-m", "trlx.backends.torchrun", "--standalone", "--nproc-per-node", "2"]
    made = ["--prompts", "made", "--reward", "made"]
    assert command == ["-m", "trlx", "ppo", "train.seed=1", "--model", "tiny", *made, *typed[4:]]


def test_a_run_is_trained_and_a_failing_reward_is_exit_code_1(folder, capsys, caplog, monkeypatch):
    monkeypatch.setattr("trlx.run.checks.shutil.disk_usage", lambda _: SimpleNamespace(free=7))
    few = "method.num_rollouts=2 method.chunk_size=2 method.ppo_epochs=1 method.gen_kwargs.max_new_tokens=2"
    few = f"{few} train.batch_size=2 train.total_steps=1 --model tiny --out run".split()
    assert main(["ppo", *few]) == 0
    assert "reward/mean" in (folder / "run" / "metrics.jsonl").read_text()
    assert "A checkpoint takes about 0.00 GiB, and 0.00 are free at" in caplog.text
    code, printed = failure(capsys, "ppo", *few, "--reward", "judges:broken", "--out", "other")
    assert code == 1 and "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert last.startswith("trlx ppo: ") and "ZeroDivisionError: division by zero" in last and "judges.py" in last


def test_config_show_says_where_each_value_came_from(folder, capsys):
    (folder / "mine.yaml").write_text("method: {gamma: 0.5}\noptimizer: {kwargs: {lr: 1.0e-3}}\n")
    assert main(["config", "show", "ppo", "mine.yaml", "train.seed=3", "--model", "gpt2"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.partition("#")[2].strip() for line in printed.splitlines() if "#" in line}
    origins = {"gamma:": "mine.yaml", "lr:": "mine.yaml", "betas:": "preset ppo", "seed:": "command line"}
    assert {key: lines[key] for key in origins} == origins
    assert (lines["lam:"], lines["model_path:"], lines["batch_size:"]) == ("default", "command line", "preset ppo")
    assert main(["config", "show", "grpo", "qwen3-4b", "8gpu", "train.seed=3"]) == 0
    layered = capsys.readouterr().out
    assert "# preset qwen3-4b 8gpu" in layered and "# preset grpo" in layered and "# command line" in layered
    again = trlx.TRLConfig.from_dict(yaml.safe_load(printed))
    assert (again.method.gamma, again.train.seed, again.optimizer.kwargs["lr"]) == (0.5, 3, 1e-3)
    (folder / "mine.yaml").write_text("tokenizer: {tokenizer_path: another}\n")
    assert main(["config", "show", "mine.yaml"]) == 0
    assert 'tokenizer_path: "another"' in (printed := capsys.readouterr().out) and "# preset ppo" in printed
    assert main(["config", "show", "mine.yaml", "--model", "gpt2"]) == 0
    assert "tokenizer_path: null" in capsys.readouterr().out
