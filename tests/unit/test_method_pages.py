"""docs/methods/ and docs/from-trl.md name settings, defaults, statistics, trainers and presets that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import trlx
from tests.unit.test_docs import CODE, DOCS, as_regex, documented_statistics
from trlx.api import trainers
from trlx.strict import called_here

METHODS = sorted((DOCS / "methods").glob("*.md"))
FROM_TRL = DOCS / "from-trl.md"
STATISTIC = re.compile(r"[a-z_]+/[\w/@=]+")


def sections(page: Path, heading: str) -> Iterator[tuple[str, str]]:
    """Heading and text of the sections whose heading matches."""
    for part in page.read_text().split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        if re.match(heading, title):
            yield title, text


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of tables."""
    lines = (re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line] for line in lines]


def names(cell: str) -> list[str]:
    return CODE.findall(cell)


def written_defaults() -> dict[str, dict[str, str]]:
    """By heading of docs/config.md, the default of every setting as it is written there."""
    found = sections(DOCS / "config.md", "")
    return {title: {name: row[1] for row in rows(text) for name in names(row[0])} for title, text in found}


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.name)
def test_a_page_of_a_method_names_its_settings_with_their_defaults(page):
    known = written_defaults()
    others = {key: default for title, table in known.items() if ":" not in title for key, default in table.items()}
    tables = list(sections(page, "Settings: "))
    assert tables, "a section '## Settings: <the class>'"
    for title, text in tables:
        of_method = known[f"method: {title.removeprefix('Settings: ')}"] | others
        for name, default, *_ in rows(text)[1:]:
            assert of_method[name.strip("`")] == default, f"{page.name}: {name}"


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.name)
def test_a_page_of_a_method_names_statistics_trainers_and_presets_that_exist(page):
    ((_, curves),) = sections(page, "Healthy curves")
    ((_, runs),) = sections(page, "Presets and trainers")
    told = {name for cells in rows(curves) if cells[1][0].isdigit() for name in names(cells[0])}
    told |= {name for name in CODE.findall(curves) if STATISTIC.fullmatch(name)}
    assert told
    patterns = [re.compile(as_regex(name)) for name in documented_statistics()]
    assert {name for name in told if not any(p.fullmatch(name.split("@")[0]) for p in patterns)} == set()
    named = dict(row[:2] for row in rows(runs))
    presets = next(cell for kind, cell in named.items() if kind.startswith("preset"))
    assert [trlx.load_preset(preset).method.name for preset in names(presets)]
    assert [trainers.get(name) for kind in named for name in names(kind)]


@pytest.mark.parametrize("page", ["troubleshooting.md", "quickstart.md"])
def test_a_page_of_advice_names_settings_and_statistics_that_exist(page):
    told = set(CODE.findall((DOCS / page).read_text()))
    settings = {
        re.split(r"[:= ]", name)[0] for name in told if re.match(r"(method|train|model|optimizer|scheduler)\.", name)
    }
    defaults = [name for table in written_defaults().values() for name in table]
    known = {*defaults, "optimizer.kwargs.lr", "train.sampler.places"}
    statistics = {name for name in told if STATISTIC.fullmatch(name) and not name.startswith(("pictures/", "runs/"))}
    patterns = [re.compile(as_regex(name)) for name in documented_statistics()]
    assert settings and settings - known == set()
    assert statistics and {name for name in statistics if not any(p.fullmatch(name) for p in patterns)} == set()


def test_the_page_for_users_of_trl_names_trainers_presets_and_statistics_that_exist():
    text = FROM_TRL.read_text()
    assert all(trainers.get(name) for name in re.findall(r"`((?:Accelerate|NeMo)\w+Trainer)`", text))
    ((_, table),) = sections(FROM_TRL, "Trainers")
    for _, theirs, preset, _ in rows(table)[1:]:
        assert trlx.load_preset(preset.strip("`")).train.trainer == names(theirs)[0]
    ((_, logged),) = sections(FROM_TRL, "Logged numbers")
    patterns = [re.compile(as_regex(name)) for name in documented_statistics()]
    told = [name for row in rows(logged)[1:] for name in names(row[1]) if "kl_in" not in name]
    assert [name for name in told if not any(p.fullmatch(re.sub(r"<\w+>", "x", name)) for p in patterns)] == []


def test_the_page_for_users_of_trl_names_settings_with_their_defaults_and_says_what_errors_say():
    known = list(written_defaults().values())
    settings = [row for _, text in sections(FROM_TRL, "Settings of ") for row in rows(text) if len(row) == 5]
    of_trlx = [row for row in settings if "." in row[2] and "`trlx." not in row[2]]
    assert len(of_trlx) > 30
    for theirs, _, ours, default, _ in of_trlx:
        for key in names(ours):
            assert default in [table[key] for table in known if key in table], f"{theirs}: {key} has not {default}"
        for name, key in zip(names(theirs), names(ours), strict=True):
            assert name == key.split(".")[1] or key in called_here(name), f"{name}: {called_here(name)}"
