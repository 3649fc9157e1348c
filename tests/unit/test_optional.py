"""A missing package explains itself; a broken one, or a typo of ours, comes through as it is."""

from __future__ import annotations

import sys
import textwrap

import pytest

from tests.runs import tiny_config
from trlx.optional import is_available, require
from trlx.registry import trainers
from trlx.trainer import nemo


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes a module, given by its dotted name and source, where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, source: str = "") -> None:
        folder = tmp_path.joinpath(*name.split("."))
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(textwrap.dedent(source))

    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0].startswith("fake_"):
            del sys.modules[name]


@pytest.fixture
def no_toolkit(monkeypatch):
    for name in ("megatron", "megatron.core", "einops"):
        monkeypatch.setitem(sys.modules, name, None)


def test_a_missing_part_of_an_installed_package_counts_as_missing(install):
    install("fake_megatron")
    assert not is_available("fake_megatron.core")


def test_availability_does_not_import(install):
    install("fake_heavy", "raise RuntimeError('imported')")
    assert is_available("fake_heavy")
    assert not is_available("fake_absent.deep.inside")


@pytest.mark.parametrize(
    "source, message", [("import fake_dependency", "fake_dependency"), ("from math import tpyo", "tpyo")]
)
def test_an_import_error_inside_an_installed_package_is_not_taken_for_its_absence(install, source, message):
    install("fake_broken", source)
    with pytest.raises(ImportError, match=message) as caught:
        require("fake_broken.part", extra="x", purpose="This")
    assert "pip install" not in str(caught.value)


def test_require_names_everything_that_is_missing_and_what_to_install(install):
    install("fake_present")
    words = r'Training needs fake_one and fake_two, which are not installed: pip install "trlx\[nemo\]"'
    with pytest.raises(ImportError, match=words) as caught:
        require("fake_one", "fake_present", "fake_two", extra="nemo", purpose="Training")
    assert caught.value.name == "fake_one"


@pytest.mark.parametrize("name", ["NeMoPPOTrainer", "NeMoILQLTrainer", "NeMoSFTTrainer"])
def test_without_the_toolkit_a_nemo_trainer_is_registered_and_says_what_to_install(name, no_toolkit):
    trainer = trainers.get(name)
    with pytest.raises(ImportError) as caught:
        trainer(config=None)
    for word in ("NeMo", "Megatron-Core", "megatron.core", "einops", 'pip install "trlx[nemo]"'):
        assert word in str(caught.value)


def test_with_the_toolkit_a_nemo_trainer_is_a_trainer_like_the_others(tmp_path):
    with pytest.raises(ValueError, match="NeMoPPOTrainer needs method.name PPOConfig, got SFTConfig"):
        trainers.get("NeMoPPOTrainer")(config=tiny_config(tmp_path, "SFT"))


def test_a_typo_of_ours_is_not_reported_as_a_missing_toolkit(no_toolkit, install, monkeypatch):
    install("fake_ours", "from math import tpyo")
    monkeypatch.setattr(nemo, "TOOLKIT", ("fake_ours.megatron",))
    with pytest.raises(ImportError, match="tpyo") as caught:
        trainers.get("NeMoPPOTrainer")()
    assert "NeMo" not in str(caught.value)
