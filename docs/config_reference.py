"""Writes the tables of docs/config.md from the dataclasses and the strings below their fields.

Usage: python -m docs.config_reference
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

from trlx import config, method_configs

PAGE = Path(__file__).parent / "config.md"
MARK = "<!-- Below this line everything is written by docs/config_reference.py. -->\n"
SECTIONS = (
    config.TrainConfig,
    config.ModelConfig,
    config.TokenizerConfig,
    config.OptimizerConfig,
    config.SchedulerConfig,
    method_configs.PPOConfig,
    method_configs.GRPOConfig,
    method_configs.ILQLConfig,
    method_configs.SFTConfig,
    method_configs.RFTConfig,
    method_configs.DPOConfig,
    method_configs.KTOConfig,
    method_configs.RewardConfig,
)
SAID_BY_THE_NAME = {
    "project_name": "Project in Weights & Biases.",
    "run_name": "Name of the run; null: script/model/processes:branch.",
    "entity_name": "User or team in Weights & Biases.",
    "group_name": "Group of runs in Weights & Biases.",
    "tags": "Tags of the run.",
    "seed": "Seed of everything random; each process adds its number.",
}
"""Fields without a string in the source."""


def page() -> str:
    """The page: the text above the mark as it is, new tables below."""
    by_hand, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return by_hand + mark + "\n".join(map(table, SECTIONS))


def table(section: type) -> str:
    """One section as a Markdown table: key, default, meaning."""
    name = f"{section.section}: {section.__name__}" if section.section == "method" else section.section
    texts = SAID_BY_THE_NAME | {key: text for cls in reversed(section.__mro__[:-1]) for key, text in field_texts(cls)}
    lines = [f"\n## {name}\n", f"{inspect.getdoc(section)}\n", "| key | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(section):
        meaning = " ".join(texts[field.name].split()).replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{section.section}.{field.name}` | {_default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def field_texts(section: type) -> Iterator[tuple[str, str]]:
    """Each field and the string below it in the source."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and is_text:
            yield statement.target.id, following.value.value


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    return "required" if field.default is dataclasses.MISSING else f"`{_yaml(field.default)}`"


def _yaml(value: object) -> str:
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(str(value), str(value))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
