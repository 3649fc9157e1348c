"""Names of CarperAI's trlx that are gone: every one is answered with what to use instead, and that exists."""

import pkgutil
import re
import warnings
from pathlib import Path

import pytest

from tests.unit.original_names import ORIGINAL
from trlx.compat.imports import GONE, OLD_PATHS

DOCS = Path(__file__).parents[2] / "docs"


def imported(module: str, name: str) -> object:
    """What ``from module import name`` gives."""
    scope: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(f"from {module} import {name}", scope)
    return scope[name]


@pytest.mark.parametrize("module", ORIGINAL)
def test_every_name_of_the_original_works_or_says_what_replaces_it(module):
    for name in ORIGINAL[module]:
        try:
            assert imported(module, name) is not None
        except ImportError as error:
            assert re.match(rf"{module}(\.{name})? of CarperAI's trlx is gone: \w", str(error)), str(error)


def test_a_gone_name_fails_with_its_sentence_however_it_is_imported():
    sentence = GONE["trlx.utils.Clock"]
    assert sentence.startswith("trlx.utils.Clock of CarperAI's trlx is gone: time.perf_counter()")
    with pytest.raises(ImportError) as caught:
        from trlx.utils import Clock  # noqa: F401
    assert str(caught.value) == sentence
    import trlx.utils

    with pytest.raises(AttributeError) as caught:
        trlx.utils.Clock  # noqa: B018
    assert str(caught.value) == sentence
    assert not hasattr(trlx.utils, "Clock")


def test_a_gone_module_fails_with_its_sentence_however_it_is_imported():
    sentence = GONE["trlx.data.ppo_types"]
    lines = ["import trlx.data.ppo_types", "from trlx.data import ppo_types", "from trlx.data.ppo_types import Any"]
    for line in lines:
        with pytest.raises(ImportError) as caught:
            exec(line, {})
        assert str(caught.value) == sentence


def test_names_and_modules_beneath_a_gone_one_are_gone_with_it():
    with pytest.raises(ImportError, match=r"trlx\.orchestrator of CarperAI's trlx is gone: trainers draw prompts"):
        from trlx.orchestrator.ppo_orchestrator import PPOOrchestrator  # noqa: F401


def test_what_a_sentence_names_is_there():
    instead = {sentence.partition(" is gone: ")[2] for sentence in GONE.values()}
    for place in {place for sentence in instead for place in re.findall(r"\btrlx(?:\.\w+)+", sentence)}:
        assert pkgutil.resolve_name(place) is not None, place
    pages = {page for sentence in instead for page in re.findall(r"docs/([\w-]+\.md)", sentence)}
    assert [page for page in pages if not (DOCS / page).exists()] == []


def test_nothing_that_works_is_called_gone():
    works = {f"{module}.{name}" for module, names in OLD_PATHS.items() for name in names}
    assert works & set(GONE) == set()
    assert set(OLD_PATHS) & set(GONE) == set()


def test_every_module_that_is_gone_stands_in_the_migration_page():
    page = (DOCS / "migration.md").read_text()
    modules = [name for name in GONE if name in ORIGINAL]
    assert len(modules) == 12
    assert [module for module in modules if f"`{module}`" not in page] == []
