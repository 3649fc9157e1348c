"""How Sphinx makes a site of these pages: ``sphinx-build -W --keep-going -n docs build/site``.

The notebooks run while it builds, and a cell that fails ends the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import trlx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"(\]\(|<img src=\")(\.\./[^)#\"\s]+)")

project = "trlx"
release = trlx.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "trlx"
html_show_copyright = False

# docstrings have Markdown's single backticks around code
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# types of other packages, and internal ones, have no page to link to
nitpick_ignore_regex = [("py:.*", ".*")]

myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True


def setup(app):
    app.connect("source-read", link_to_sources)


def link_to_sources(app, docname: str, source: list[str]) -> None:
    """Turns relative links that leave docs/ into addresses: of the repository in GitHub's CI, else of this folder."""
    folder = (DOCS / docname).parent
    source[0] = LINK.sub(lambda match: match[1] + address(folder, match[2]), source[0])


def address(folder: Path, target: str) -> str:
    """`target` as it is if it is a page of the site or missing (then Sphinx warns), else where it can be read."""
    file = (folder / target).resolve()
    if not file.exists() or file.is_relative_to(DOCS):
        return target
    if "GITHUB_REPOSITORY" not in os.environ:
        return file.as_uri()
    server, repository, commit = (os.environ[f"GITHUB_{name}"] for name in ("SERVER_URL", "REPOSITORY", "SHA"))
    return f"{server}/{repository}/blob/{commit}/{file.relative_to(ROOT)}"
