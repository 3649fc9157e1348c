"""The rules of the code's layout that linters cannot see, and what the installed package contains."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import trlx

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

HOMES = {
    "accelerate": ("trlx.backends", "trlx.tracking.remotes"),
    "megatron": ("trlx.backends",),
    "nemo": ("trlx.backends",),
    "torch.distributed": ("trlx.backends",),
    "wandb": ("trlx.tracking.remotes",),
    "ray": ("trlx.launch",),
}
"""The one place that may use a package, also through an attribute of torch or a name in a string."""


def sources(*folders: str) -> list[Path]:
    """Every Python file of the repository under `folders`."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def used_modules(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, imports by a name in a string, or reaches as attributes of torch."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node) if ast.unparse(node).startswith("torch.") else ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def test_no_file_is_longer_than_400_lines():
    files = sources("trlx", "examples", "benchmarks", "tests")
    lengths = {shown(path): len(path.read_text().splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines():
    long = {}
    for path in sources("trlx", "examples", "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                long |= {f"{shown(path)}:{node.name}": length} if length > MAX_FUNCTION_LINES else {}
    assert long == {}


def test_no_check_of_complexity_is_silenced():
    silenced = re.compile(r"#\s*(ruff: *)?noqa(?!: *[A-Z])|noqa[^\n]*\b(C90|PLR09)")
    files = [path for path in sources("trlx", "examples", "benchmarks", "tests") if path != Path(__file__)]
    assert [shown(path) for path in files if silenced.search(path.read_text())] == []


def test_nothing_is_called_utils():
    assert [shown(path) for path in sources("trlx") if "utils" in module_of(path)] == []


@pytest.mark.parametrize("package", HOMES)
def test_a_package_is_used_only_in_its_one_place(package):
    users = [path for path in sources("trlx") if any(inside(name, package) for name in used_modules(path))]
    assert [shown(path) for path in users if not any(inside(module_of(path), home) for home in HOMES[package])] == []


def test_methods_know_nothing_but_torch_and_the_batch():
    allowed = ("torch", "trlx.batch", "trlx.methods", *sys.stdlib_module_names)
    for path in sources("trlx/methods"):
        names = [name for name in used_modules(path) if name]
        assert [name for name in names if not any(inside(name, package) for package in allowed)] == [], shown(path)


def test_every_folder_of_the_package_is_a_package():
    folders = {path.parent for path in sources("trlx")}
    assert [shown(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_importing_trlx_and_its_help_loads_no_torch():
    helps = "main([]), main(['train', '--help'])"
    code = f"import sys, trlx; from trlx.launch.cli import main; {helps}; "
    code += "assert not {'torch', 'transformers', 'numpy', 'omegaconf'} & set(sys.modules), 'not lazy'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_is_there():
    for name in trlx.__all__:
        assert getattr(trlx, name) is not None
    assert set(trlx.__all__) <= set(dir(trlx))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        trlx.trian  # noqa: B018


@pytest.fixture
def source(tmp_path):
    """What a package is built from, in a folder that building may write to, named as a clone is."""
    folder = tmp_path / "trlx"
    for name in ("trlx", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_the_wheel_holds_every_module_and_every_preset(source, tmp_path):
    # --no-deps and --no-build-isolation: nothing is fetched
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("trlx-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    presets = {f"trlx/{shown(path)}" for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".yml")}
    parts = {shown(path) for path in (ROOT / "trlx" / "report" / "parts").iterdir()} | {"trlx/launch/slurm/run.sh"}
    assert names == presets | parts | {shown(path) for path in sources("trlx")}
    assert trlx.__version__ in wheel.name


def test_an_editable_install_puts_the_checkout_on_the_path(source, tmp_path):
    # a finder of modules, which setuptools installs for other layouts, would lose against a folder named trlx
    build = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = map(zipfile.ZipFile, tmp_path.glob("trlx-*.whl"))
    (added,) = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert added.endswith(".pth") and wheel.read(added).decode().strip() == str(source)


def test_every_file_names_the_same_oldest_python():
    told = {name: (ROOT / name).read_text() for name in ("setup.py", "pyproject.toml", "README.md", "CONTRIBUTING.md")}
    (oldest,) = re.findall(r'python_requires=">=3\.(\d+)"', told["setup.py"])
    assert min(re.findall(r"Python :: 3\.(\d+)", told["setup.py"])) == oldest
    assert f'target-version = "py3{oldest}"' in told["pyproject.toml"]
    assert all(f"Python 3.{oldest} or newer" in told[name] for name in ("README.md", "CONTRIBUTING.md"))
    versions = re.findall(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert versions == [", ".join(f'"3.{number}"' for number in re.findall(r"Python :: 3\.(\d+)", told["setup.py"]))]
