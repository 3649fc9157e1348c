"""Every command of the documentation does what it is there for, typed into a fresh clone with the models at hand.

A command is run. Or it is only checked, where it needs the hub, a package index, several processes or a cluster: then
its parser takes the arguments, files and settings that it names are there, and what it trains is put together up to
``trlx.train``. `RUN` and `CHECKED` say which and why; a command that neither of them knows fails.
"""

import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser
from transformers import LlamaConfig, LlamaForCausalLM

import trlx
from examples.common import byte_tokenizer
from trlx.launch import compare, demo, generate, replay, sweep
from trlx.launch.cli import main as trlx_command
from trlx.launch.space import read_space
from trlx.launch.sweep import Sweep

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "examples" / "README.md", ROOT / "examples" / "slurm" / "README.md"]
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
INLINE = re.compile(
    r"python -m [a-z].*|trlx (plan|report) .*|pytest.*|pip install.*|conda .*|sbatch .*sbatch .*|"
    r"(torchrun|accelerate) .*\.py|tests/.*sh"
)
"""What is a whole command where it stands in a sentence or a table; others are parts of one."""
PLACEHOLDERS = {"<folder>": "ckpts", "YOUR.MODULE": "examples.ppo_sentiments", "trlx[...]": "trlx[peft]"}


def blocks(page: Path) -> list[str]:
    """The fenced blocks in bash."""
    return [text for kind, text in FENCED.findall(page.read_text()) if kind == "bash"]


def commands(page: Path) -> list[str]:
    """What a page tells its readers to type, in order: each line of its bash blocks, then what stands in sentences."""
    lines = itertools.chain.from_iterable(map(logical_lines, blocks(page)))
    spans = (" ".join(span.split()) for span in SPAN.findall(FENCED.sub("", page.read_text())))
    return [*lines, *filter(INLINE.fullmatch, spans)]


def logical_lines(script: str) -> Iterator[str]:
    """The lines of a script, with those that a backslash or an open quote continues in one."""
    waiting = ""
    for line in script.splitlines():
        waiting += line.removesuffix("\\")
        if not line.endswith("\\") and is_whole(waiting):
            yield waiting
            waiting = ""
    assert not waiting, "a quote is left open"


def is_whole(line: str) -> bool:
    try:
        return shlex.split(line, comments=True) is not None
    except ValueError:  # an open quote
        return False


def programs(line: str) -> Iterator[list[str]]:
    """The programs that a line starts, with their arguments; comments and the shell's own words are left out."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]
    for is_end, part in itertools.groupby(words, lambda word: word == "&&"):
        part = list(itertools.dropwhile(lambda word: word in ("exec", "requeued") or re.match(r"[A-Z_]+=", word), part))
        if not is_end and part and part[0] not in ("if", "export", "trap", "."):
            yield part


def test_a_line_is_taken_apart_as_a_shell_does():
    lines = list(logical_lines("a b \\\n  c  # d\n\nsrun bash -c 'X=1 \\\n exec e \"f g\"'"))
    assert [list(programs(line)) for line in lines] == [
        [["a", "b", "c"]],
        [],
        [["srun", "bash", "-c", 'X=1  exec e "f g"']],
    ]
    assert list(programs(". x && A_B=1 c 'd && e' && if f")) == [["c", "d && e"]]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A working folder with what a clone holds, and what the pages say that their readers have."""
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "ckpts", "wandb"):
            (tmp_path / entry.name).symlink_to(entry)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 8}
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=8, **sizes))
    for name in ("path/to/hf_model", "path/to/llama", "gpt2"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "mine.jsonl").write_text('{"text": "a film that I saw, and liked", "label": 1}\n')
    (tmp_path / "my_module.py").write_text("def my_reward(samples, **kwargs):\n    return [len(s) for s in samples]\n")
    (tmp_path / "script.py").write_text("import trlx\n")
    (tmp_path / "prompts.jsonl").write_text('{"question": "2 + 2 =", "answer": "4"}\n')
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n2 + 2 =,4,5\n")
    (tmp_path / "scored.csv").write_text("text,score\na film that I saw,0.5\n")
    (tmp_path / "mine.yaml").write_text("train: {seed: 3}\n")
    (tmp_path / "judges.py").write_text("def brief(outputs):\n    return [-len(output) for output in outputs]\n")
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "ckpts" / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n{"step": 1, "loss": 2.0}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_work(page, clone):
    for line in commands(page):
        for program in programs(line):
            try:
                try_out(program)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{line}\n{type(error).__name__}: {error}") from error


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_bash_understands_the_blocks_of_a_page(page):
    for block in blocks(page):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_every_way_to_try_a_command_is_needed():
    found = [" ".join(program) for page in PAGES for line in commands(page) for program in programs(line)]
    assert [kind for kind in (*RUN, *CHECKED) if not any(re.match(kind, each) for each in found)] == []


def try_out(program: list[str]) -> None:
    """Runs or checks one program with its arguments."""
    typed = " ".join(program)
    found = next((kind for kind in (*RUN, *CHECKED) if re.match(kind, typed)), None)
    assert found, f"Say in RUN or in CHECKED how to try {typed!r}"
    attempt = RUN[found] if found in RUN else CHECKED[found][0]
    attempt(program)


def run_trlx(program: list[str]) -> None:
    assert trlx_command(program[1 if program[0] == "trlx" else 3 :]) == 0


def check_train(program: list[str]) -> None:
    run_trlx([*program, "--dry-run"])


def run_example(program: list[str]) -> None:
    run_module(program[2], program[3:])


def check_example(program: list[str]) -> None:
    check_module(program[2], program[3:])


def check_module(module: str, arguments: list[str]) -> None:
    """`module` as a command, with data and a reward that need no network, up to where it would train."""
    source = Path(find_spec(module).origin).read_text()
    if "arguments(__doc__)" in source:
        missing = [name for name in ("--data", "--reward") if name not in arguments]
        arguments = [*arguments, *(word for name in missing for word in (name, "made"))]
    elif not re.search(r"trlx\.train\(|\b(learn_online|learn_offline|pretrain)\(", source):
        arguments = [*arguments, "--help"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trlx, "train", started := MagicMock())
        run_module(module, arguments)
    assert "--help" in arguments or isinstance(started.call_args.kwargs["config"], trlx.TRLConfig)


def run_module(module: str, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, module, raising=False)  # runpy warns of one that is there
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"it ends with {end.code!r}"


def check_torchrun(program: list[str]) -> None:
    check_started(get_args_parser().parse_args(program[1:]))


def check_accelerate(program: list[str]) -> None:
    options = launch_command_parser().parse_args(program[2:])
    assert options.config_file is None or Path(options.config_file).is_file()
    check_started(options)


def check_started(options: Namespace) -> None:
    """What a launcher starts, a module or a script, in this one process."""
    if options.module:
        check_module(options.training_script, options.training_script_args)
    else:
        assert Path(options.training_script).is_file(), options.training_script


def check_sbatch(program: list[str]) -> None:
    file, module, *arguments = itertools.dropwhile(lambda word: word.startswith("--"), program[1:])
    assert Path(file).is_file(), file
    check_module(module, arguments)


def check_sweep(program: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run", started := MagicMock(return_value=0))
        run_trlx(program)
    given = started.call_args.kwargs
    assert Sweep(given["work"], read_space(given["config"])).name


def check_sampling(program: list[str]) -> None:
    """The command with the small random model in place of what the reader has trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "become", lambda command: None)
        patch.setattr("builtins.input", MagicMock(side_effect=EOFError))
        run_trlx([*program[:2], "tiny", *program[3:]])


def check_demo(program: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run", started := MagicMock())
        run_trlx(program)
    assert started.call_args.args[0] in demo.PRESETS


def check_replay(program: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "replay", started := MagicMock(return_value=0))
        run_trlx(program)
    assert started.call_args.args[1] > 0


def check_compare(program: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "compare", started := MagicMock())
        run_trlx(program)
    _, _, scripts, seeds, _ = started.call_args.args
    for script in scripts:
        try_out(shlex.split(script.format(seed=seeds[0])))


def check_old_name(program: list[str]) -> None:
    """A module that hands its arguments to a command: they are that command's."""
    command = {"trlx.sweep": check_sweep, "trlx.reference": check_compare}[program[2]]
    assert find_spec(program[2])
    if program[3:]:
        command(["python", "-m", "trlx", command.__name__.removeprefix("check_"), *program[3:]])


def check_help(program: list[str]) -> None:
    run_module(program[2], [*program[3:], "--help"])


def check_pip(program: list[str]) -> None:
    """Files and extras are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", MagicMock())
        extras = runpy.run_path(str(ROOT / "setup.py"))["EXTRAS"]
    for word in program[2:]:
        if word.endswith(".txt"):
            assert Path(word).is_file(), word
        elif not word.startswith("-"):
            asked = Requirement(re.sub(r"^\.", "trlx", word))
            assert asked.name != "trlx" or asked.extras <= extras.keys(), word


def check_pytest(program: list[str]) -> None:
    """The files are there, and tests of the name or the marker that are asked for."""
    paths = [Path(word) for word in program[1:] if word.startswith("tests")] or [Path("tests")]
    texts = [file.read_text() for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
    assert texts and all(path.exists() for path in paths)
    wanted = {"-k": r"def test_\w*{}", "-m": r"mark\.{}"}
    for option, value in itertools.pairwise(program):
        if option in wanted:
            assert any(re.search(wanted[option].format(value), text) for text in texts), value


def check_script(program: list[str]) -> None:
    (file,) = program
    assert os.access(file, os.X_OK)
    subprocess.run(["bash", "-n", file], check=True)


def check_conda(program: list[str]) -> None:
    assert program[:4] == ["conda", "env", "create", "-f"] and Path(program[4]).is_file()


def check_docker(program: list[str]) -> None:
    """What docker would copy into the image is there."""
    copied = re.findall(r"^COPY (\S+) ", Path("Dockerfile").read_text(), re.MULTILINE)
    assert program[1] in ("build", "run") and copied and all(Path(name).exists() for name in copied)


def check_linter(program: list[str]) -> None:
    assert shutil.which(program[0])


RUN = {
    r"trlx (plan|check|convert|report|env|vllm|config show|ppo --model tiny|.* --dry-run)": run_trlx,
    r"python -m trlx$": run_trlx,
    r"python -m examples\.\S+ --model tiny": run_example,
}
"""Regular expressions for commands, and what runs them."""
CHECKED = {
    r"python -m examples\.": (check_example, "model and data of the hub, or minutes"),
    r"trlx (train|ppo|grpo|rft|sft|ilql|dpo|kto|reward) ": (check_train, "minutes; see tests/unit/test_cli_train.py"),
    r"trlx (generate|chat) ": (check_sampling, "a trained model; see tests/unit/test_cli_generate.py"),
    r"trlx replay": (check_replay, "trains again; see tests/unit/test_replay.py"),
    r"trlx demo": (check_demo, "minutes; .ci/run runs it"),
    r"trlx sweep": (check_sweep, "trains many times; see tests/unit/test_sweep.py"),
    r"trlx compare": (check_compare, "trains two revisions; see tests/unit/test_compare.py"),
    r"python -m trlx\.": (check_old_name, "see the two above"),
    r"python -m (benchmarks|docs)\.": (check_help, "minutes of measuring on a quiet machine, or of training"),
    r"torchrun": (check_torchrun, "several processes; see tests/examples/test_nemo_examples.py and tests/distributed"),
    r"accelerate launch": (check_accelerate, "several processes or GPUs; see tests/distributed/test_fsdp.py"),
    r"sbatch": (check_sbatch, "a cluster; see tests/slurm"),
    r"pip install": (check_pip, "a package index; .ci/run runs those of the README"),
    r"conda": (check_conda, "conda and a package index"),
    r"python3 -m venv": (lambda program: None, "python's own; .ci/run runs it"),
    r"pytest": (check_pytest, "the tests again"),
    r"docker": (check_docker, "a container engine, gigabytes and GPUs"),
    r"ruff|lint-imports|sphinx-build": (check_linter, "files that are the same everywhere; .ci/run runs them"),
    r"\.ci/run": (check_script, "the tests again"),
    r"tests/(toolkit/exchange|vllm/server)\.sh": (check_script, "minutes and a package index; the workflow runs them"),
}
"""The same for commands that are only checked, with what running them would take."""
