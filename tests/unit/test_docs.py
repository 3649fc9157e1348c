"""The documentation says what the code does."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest

import trlx
from docs import hardware_tables
from docs.config_reference import MARK, page
from docs.curves import with_numbers
from docs.error_list import GAP, messages, page_of
from tests.runs import DATA, length, share_of_a, tiny_config
from trlx.batch import Sample
from trlx.compat.imports import OLD_PATHS
from trlx.registry import register_sampler
from trlx.sampling.base import Sampler

DOCS = Path(__file__).parents[2] / "docs"
CODE = re.compile(r"`([^`\n]+)`")


def documented_statistics() -> set[str]:
    """The names in the first column of the tables of statistics.md, with {a,b} written out."""
    rows = (line.split("|")[1] for line in (DOCS / "statistics.md").read_text().splitlines() if line.startswith("| `"))
    return {name for cell in rows for pattern in CODE.findall(cell) for name in written_out(pattern)}


def written_out(pattern: str) -> list[str]:
    """`a/{b,c}` as a/b and a/c."""
    pieces = [piece.strip("{}").split(",") for piece in re.split(r"(\{[^}]*\})", pattern)]
    return ["".join(choice) for choice in itertools.product(*pieces)]


def as_regex(name: str) -> str:
    """`metrics/<name>` stands for any name there."""
    return re.sub(r"<\w+>", r"[^/@]+", name)


def brief(outputs):
    return [-float(len(output)) for output in outputs]


@register_sampler("telling")
class TellingSampler(Sampler):
    """Tells the log-probabilities of what it draws."""

    def __init__(self, backend, tokenizer):
        pass

    def generate(self, prompts, sampling):
        return [Sample([4, 5], logprobs=[-3.6, -3.6]) for _ in prompts]


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict[str, set[str]]:
    """By algorithm, the names that a run writes, without the suffix of a sweep."""
    names = {}
    for algorithm in DATA:
        folder = tmp_path_factory.mktemp(algorithm)
        in_parts = {"reward_fn": [share_of_a, brief]} if "reward_fn" in DATA[algorithm] else {}
        train = {"total_steps": 2, "eval_interval": 2, "sampler": "telling" if algorithm == "PPO" else "auto"}
        config = tiny_config(folder, algorithm, train=train)
        if algorithm == "PPO":
            config.method.importance_cap = 2.0
        metric = {} if algorithm == "Reward" else {"metric_fn": length}
        trlx.train(config=config, **metric, **DATA[algorithm] | in_parts)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        names[algorithm] = {name.split("@")[0] for line in lines for name in json.loads(line)}
    return names


@pytest.mark.parametrize("algorithm", DATA)
def test_every_statistic_that_is_logged_is_documented(logged, algorithm):
    known = [re.compile(as_regex(name)) for name in documented_statistics()]
    assert {name for name in logged[algorithm] if not any(pattern.fullmatch(name) for pattern in known)} == set()


def test_every_documented_statistic_is_logged(logged):
    names = set().union(*logged.values())
    assert {
        name for name in documented_statistics() if not any(re.fullmatch(as_regex(name), n) for n in names)
    } == set()


def test_the_tables_of_settings_are_those_of_the_code():
    written = (DOCS / "config.md").read_text()
    assert written.partition(MARK)[2] == page().partition(MARK)[2], "run: python -m docs.config_reference"


def test_every_old_import_path_stands_in_the_migration_page():
    text = (DOCS / "migration.md").read_text()
    assert [path for path in OLD_PATHS if f"`{path}`" not in text] == []


def test_links_between_pages_lead_somewhere():
    broken = []
    for file in [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "examples" / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text()):
            if "://" not in target and not (file.parent / target).exists():
                broken.append(f"{file.name}: {target}")
    assert broken == []


def test_the_list_of_messages_has_what_is_raised_and_warned_of_with_gaps_for_what_a_run_fills_in():
    code = """
def check(self, rows):
    self.require(rows > 0, "rows", "be positive")
    if rows > 9:
        raise ValueError(f"{rows} rows are too many for {self}: " "write at most 9")
    logger.warning("there are few rows, and " + str(rows))
    raise KeyError(rows)
"""
    assert list(messages(ast.parse(code))) == [
        ("setting", "….rows must be positive, got …"),
        ("error", "… rows are too many for …: write at most 9"),
        ("warning", "there are few rows, and …"),
    ]
    with pytest.raises(ValueError) as raised:
        trlx.train("gpt2", prompts=["a"])
    listed = [text for _, text in messages(ast.parse(Path(trlx.api.__file__).read_text()))]
    assert any(re.fullmatch(re.escape(text).replace(GAP, ".*"), str(raised.value)) for text in listed)
    assert page_of("trlx/backends/megatron/nemo/file.py") == "nemo-archives" and page_of("trlx/new.py") == "index"


def test_tables_of_curves_get_the_number_of_the_nearest_step_rounded():
    by_hand = (
        "| at step | 0 | 10 |\n|---|---|---|\n| `a/b` | {} | {} |\n\nand\n\n| at step | 5 |\n|---|---|\n| `c` | {} |\n"
    )
    runs = [{"a/b": [(1, -0.0001), (9, 12.4), (20, 1.0)]}, {"c": [(5, 0.0094)]}]
    assert with_numbers(by_hand.format(7, 8, 9), runs) == by_hand.format("0", "12", "0.009")
    assert with_numbers(by_hand.format(7, 8, 9), [None, {"c": [(5, 0.336)]}]) == by_hand.format(7, 8, "0.34")


def test_the_page_about_hardware_has_every_run_with_what_the_plan_says():
    written = hardware_tables.PAGE.read_text()
    runs = [(words, gpu) for gpu, of_gpu in hardware_tables.RUNS.values() for words in of_gpu]
    assert [words for words, _ in runs if f"| `{words}` |" not in written] == []
    # those of Megatron are sums; the others rehearse a model, which takes seconds each
    sums = [hardware_tables.row(words, gpu) for words, gpu in runs if "megatron" in words]
    assert sums and [row for row in sums if row not in written] == [], "run: python -m docs.hardware_tables"


def test_every_page_stands_in_the_menu_of_the_site():
    menu = "\n".join(re.findall(r"```{toctree}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)).splitlines()
    pages = [file for file in DOCS.rglob("*") if file.suffix in (".md", ".ipynb") and file != DOCS / "index.md"]
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in pages} - set(menu) == set()


@pytest.mark.parametrize("file", sorted(DOCS.rglob("*.md")), ids=lambda file: str(file.relative_to(DOCS)))
def test_python_in_the_documentation_compiles(file):
    for block in re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL):
        compile(block, file.name, "exec")
