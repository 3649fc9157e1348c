"""`trlx env`: versions, machine and variables of the environment, the same as in every run's folder."""

import ast
import json
from pathlib import Path

import torch

import trlx
from trlx.launch.cli import main
from trlx.report import environment

INTERNAL = {"TRLX_TOLD_ONCE", "TRLX_REPLAY", "TORCHELASTIC_ERROR_FILE"}
"""Variables by which one process of trlx tells another."""


def test_env_prints_versions_machine_and_variables_on_one_screen(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert {"CPUs", "memory", "python", "trlx", "packages", "variables"} <= {line.split()[0] for line in lines}
    assert f"torch {torch.__version__}" in printed and trlx.__version__ in printed
    assert "WANDB_MODE=offline" in printed and "secret" not in printed
    assert main(["env", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("variables")["WANDB_MODE"] == "offline"
    assert told == environment.environment()


def test_env_knows_every_variable_that_trlx_reads():
    found = set()
    for path in Path(trlx.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            read = ast.unparse(node) if isinstance(node, (ast.Call, ast.Subscript)) else ""
            if read.startswith(("os.environ.get(", "os.environ[", "os.getenv(", "parse_flag_from_env(")):
                name = node.slice if isinstance(node, ast.Subscript) else node.args[0]
                found.add(name.value if isinstance(name, ast.Constant) else constants.get(ast.unparse(name), path))
    known = {name for names in environment.VARIABLES.values() for name in names}
    assert {name for name in found if isinstance(name, str)} - INTERNAL <= known and "TRLX_VERBOSITY" in found
