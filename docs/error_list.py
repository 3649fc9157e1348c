"""Lists the errors and warnings of trlx for docs/errors.md, from the source code, when Sphinx builds the site.

Usage: python -m docs.error_list (prints the list)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
GAP = "…"
"""Stands for what a run fills in."""
LETTERS = 12
"""Messages with fewer letters of their own are not listed: whoever raises them makes the sentence elsewhere."""
PAGES = {
    "trlx/background.py": "launching",
    "trlx/backends": "launching",
    "trlx/backends/megatron": "megatron",
    "trlx/backends/megatron/nemo": "nemo-archives",
    "trlx/backends/megatron/settings.py": "megatron-config",
    "trlx/backends/megatron/size_checks.py": "megatron-config",
    "trlx/batch.py": "concepts",
    "trlx/checkpoint.py": "launching",
    "trlx/compat": "migration",
    "trlx/config.py": "config",
    "trlx/data": "data",
    "trlx/guard_rules.py": "guards",
    "trlx/launch": "command-line",
    "trlx/launch/compare.py": "sweeps",
    "trlx/launch/convert.py": "nemo-archives",
    "trlx/launch/plan": "scaling",
    "trlx/launch/replay.py": "guards",
    "trlx/launch/report.py": "report",
    "trlx/launch/results.py": "sweeps",
    "trlx/launch/space.py": "sweeps",
    "trlx/launch/sweep.py": "sweeps",
    "trlx/launch/trial.py": "sweeps",
    "trlx/method_configs.py": "config",
    "trlx/methods": "concepts",
    "trlx/model_presets.py": "presets",
    "trlx/models": "extending",
    "trlx/presets.py": "presets",
    "trlx/registry.py": "extending",
    "trlx/report": "report",
    "trlx/rewards": "rewards",
    "trlx/run": "launching",
    "trlx/run/callbacks.py": "extending",
    "trlx/run/guards.py": "guards",
    "trlx/sampling": "concepts",
    "trlx/strict.py": "config",
    "trlx/tracking": "tracking",
    "trlx/trainer": "concepts",
    "trlx/yaml_files.py": "config",
}
"""The page about what a file or folder complains of; the longest name that fits counts."""


def listing() -> str:
    """Markdown: a section for each page, in it each file with its messages."""
    sections: dict[str, list[str]] = {}
    for file in sorted((ROOT / "trlx").rglob("*.py")):
        found = dict.fromkeys(messages(ast.parse(file.read_text(encoding="utf-8"))))
        if found:
            name = str(file.relative_to(ROOT))
            lines = "".join(f"- {kind}: {code(text)}\n" for kind, text in found)
            sections.setdefault(page_of(name), []).append(f"\n[`{name}`](../{name})\n\n{lines}")
    return "".join(
        f"\n### {title(page)}\n\nExplained in [{title(page)}]({page}.md).\n{''.join(files)}"
        for page, files in sections.items()
    )


def messages(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What is raised or warned of in a module: the kind, and the text with gaps, in the order of the file."""
    for call, kind in complaints(tree):
        text = " ".join(sentence(call, kind).split())
        if sum(letter.isalpha() for letter in text) >= LETTERS:
            yield kind, text


def complaints(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Calls whose arguments are a message: of exceptions, of loggers, and of checks that raise."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: call.lineno):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if re.fullmatch(r"[A-Z]\w*(Error|Exit|Interrupt|Gone|Elsewhere)", name) or name == "_complaint":
            yield call, "error"
        elif name in ("warning", "warn"):
            yield call, "warning"
        elif name == "require" and len(call.args) == 3:
            yield call, "setting"


def sentence(call: ast.Call, kind: str) -> str:
    """The words of a message; a check of a setting says "`name` must `rule`"."""
    if kind == "setting":
        _, name, rule = map(words, call.args)
        return f"{GAP}.{name} must {rule}, got {GAP}"
    return words(call.args[0]) if call.args else ""


def words(node: ast.expr) -> str:
    """A string as it is written, with gaps for what is computed."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return re.sub(f"{GAP}+", GAP, "".join(map(words, node.values)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return GAP


def page_of(file: str) -> str:
    """The page that explains the messages of a file; the first page of the site if none is named."""
    fitting = [name for name in PAGES if file == name or file.startswith(f"{name}/")]
    return PAGES[max(fitting, key=len)] if fitting else "index"


def title(page: str) -> str:
    """The heading of a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.search(r"^# (.+)", text, re.MULTILINE)[1]


def code(text: str) -> str:
    """`text` as Markdown's code, whatever quotes it has."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    print(listing())
