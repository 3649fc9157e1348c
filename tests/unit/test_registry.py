"""Names find classes in any case; an unknown name lists the known ones."""

import pytest

import trlx
from trlx.method_configs import MethodConfig, get_method
from trlx.registry import Registry


def test_a_class_registers_bare_or_under_a_name_and_is_found_in_any_case():
    registry = Registry("thing")

    @registry.register
    class Bare:
        pass

    @registry.register("OtherName")
    class Named:
        pass

    @registry.register()
    class Called:
        pass

    assert registry.get("bare") is Bare and registry.get("OTHERNAME") is Named and registry.get("Called") is Called
    assert registry.names() == ["Bare", "Called", "OtherName"]


def test_an_unknown_name_lists_the_known_and_suggests_the_nearest():
    registry = Registry("thing")
    registry.register("Hammer")(int)
    with pytest.raises(ValueError, match="Unknown thing 'hamer'. Did you mean 'Hammer'. Known: Hammer"):
        registry.get("hamer")


def test_an_own_method_section_is_chosen_by_its_name():
    from dataclasses import dataclass

    @dataclass
    @trlx.register_method
    class MyOwnConfig(MethodConfig):
        name: str = "MyOwnConfig"
        strength: float = 1.0

    assert get_method("myownconfig") is MyOwnConfig


def test_an_own_method_section_that_is_no_dataclass_is_refused():
    @trlx.register_method
    class Undecorated(MethodConfig):
        strength: float = 1.0

    with pytest.raises(TypeError, match="Undecorated has settings but is no dataclass: write @dataclass above"):
        get_method("Undecorated")


def test_a_class_that_takes_the_name_of_another_is_announced_but_its_new_definition_is_not():
    def define(registry):
        @registry.register("Tool")
        class Tool:
            pass

        return Tool

    registry = Registry("thing")
    define(registry)
    newest = define(registry)
    assert registry.get("tool") is newest
    with pytest.warns(UserWarning, match="thing 'tool' is builtins.int from now on, not tests.unit.test_registry"):
        registry.register("tool")(int)
    assert registry.get("tool") is int


def test_the_nemo_trainers_are_always_registered():
    import trlx.trainer.nemo  # noqa: F401
    from trlx.registry import trainers

    assert {"NeMoPPOTrainer", "NeMoILQLTrainer", "NeMoSFTTrainer"} <= set(trainers.names())
