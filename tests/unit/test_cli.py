"""The command line itself: help, exit codes and what stands on stderr."""

import pytest
import typer
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

import trlx
from trlx.backends import torchrun
from trlx.launch import cli
from trlx.launch.cli import main

COMMANDS = sorted(typer.main.get_command(cli.app).commands)


def failure(capsys, *argv: str) -> tuple[int, str]:
    """The exit code of a command that fails, and what it printed on stderr."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    return end.value.code, capsys.readouterr().err


def commands(group, *names: str):
    """The words of every command, those of groups in groups too."""
    for name, command in group.commands.items():
        yield (*names, name)
        yield from commands(command, *names, name) if hasattr(command, "commands") else ()


def test_the_help_of_every_command_fits_a_screen_and_shows_an_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = list(commands(typer.main.get_command(cli.app)))
    assert ("generate",) in found and ("config", "show") in found
    for words in found:
        assert main([*words, "--help"]) == 0
        printed = capsys.readouterr().out
        lines = printed.splitlines()
        takes_all_of_train = "--samples" in printed or words == ("plan",)
        assert len(lines) <= (40 if takes_all_of_train else 30) and max(map(len, lines)) <= 80, words
        examples = lines[lines.index("  Examples:") + 1 :]
        assert examples and all(line.startswith(f"    trlx {' '.join(words)}") for line in examples), words


def test_the_command_line_says_its_version_and_lists_its_commands(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trlx {trlx.__version__}\n"
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["paln"], "trlx: No such command 'paln'. Did you mean 'plan'? See trlx --help\n"),
        (["plan"], "trlx plan: Missing argument 'PRESET|FILE|FOLDER|key=value'. See trlx plan --help\n"),
        (["plan", "x", "--tp", "two"], "trlx plan: Invalid value for '--tp': "),
        (["plan", "x", "--set"], "trlx plan: Option '--set' requires an argument. See trlx plan --help\n"),
        (["plan", "nowhere.yaml"], "trlx plan: There is no file nowhere.yaml in "),
        (["plan", "ppo", "--model", "./nowhere"], "trlx plan: model.model_path is './nowhere', which does not exist "),
        (["report", "nowhere"], "trlx report: no metrics.jsonl in nowhere; "),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(argv, said, capsys):
    code, printed = failure(capsys, *argv)
    assert code == 2 and printed.startswith(said) and printed.count("\n") == 1


def test_what_nobody_meant_for_the_user_is_exit_code_1_and_says_how_to_see_more(capsys, monkeypatch):
    def failing(*_):
        raise ValueError("too many values")

    monkeypatch.setattr("trlx.launch.report.write_reports", failing)
    told = (1, "trlx report: ValueError: too many values. TRLX_TRACEBACKS=full shows where\n")
    assert failure(capsys, "report", "x") == told
    monkeypatch.setenv("TRLX_TRACEBACKS", "full")
    with pytest.raises(ValueError, match="too many values"):
        main(["report", "x"])


def test_of_several_processes_only_the_launcher_prints_what_failed_first(capsys, monkeypatch, tmp_path):
    failures = {}
    for rank, (typed, seconds) in enumerate([("nowhere.yaml", 7), ("elsewhere.yaml", 5)]):
        file = tmp_path / f"{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        monkeypatch.setattr("time.time", lambda seconds=seconds: seconds)
        monkeypatch.setenv("TRLX_TOLD_ONCE", "1")
        assert failure(capsys, "plan", typed) == (2, "")
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(file))
    first = ChildFailedError("trlx", failures)
    assert torchrun.message(first).startswith("trlx plan: There is no file elsewhere.yaml in ")
    silent = ProcessFailure(local_rank=3, pid=1, exitcode=-9, error_file="none")
    assert torchrun.message(ChildFailedError("trlx", {3: silent})) == "Process 3 ended first, with exit code -9"
    monkeypatch.delenv("TRLX_TOLD_ONCE")  # torchrun itself prints nothing of it
    assert failure(capsys, "plan", "nowhere.yaml")[1]


def test_a_shell_completes_the_names_of_commands():
    asked = {"_TRLX_COMPLETE": "complete_bash", "COMP_WORDS": "trlx re", "COMP_CWORD": "1"}
    found = CliRunner().invoke(cli.app, [], env=asked, prog_name="trlx")
    assert "report" in found.output.split() and "plan" not in found.output.split()


def test_the_printed_command_fits_the_run_and_ends_with_the_users_options(capsys):
    typed = ["vllm", "grpo", "--model", "gpt2", "train.sampler=vllm", "--", "--block-size", "32"]
    assert main(typed) == 0
    assert capsys.readouterr().out.strip().endswith("""'{"backend": "trlx"}' --block-size 32""")
    for words, said in (
        (["train.sampler.engine=vllm", "train.sampler.url=http://n1"], "names no port: write http://n1:8000"),
        (["train.sampler=vllm", "--model", "tiny"], "must be the name or folder of a model"),
    ):
        code, printed = failure(capsys, "vllm", "grpo", *words)
        assert code == 2 and said in printed
