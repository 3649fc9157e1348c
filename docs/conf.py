"""How Sphinx makes a site of these pages: ``sphinx-build -W --keep-going -n docs build/site``.

The notebooks run while it builds, and a cell that fails ends the build.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import trlx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)\s]+)\)")

project = "trlx"
release = trlx.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "trlx"
html_show_copyright = False
html_static_path = ["static"]
html_js_files = ["find_error.js"]

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
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"


FINDER = """
<p><input id="message" type="search" placeholder="Paste a message" style="width: 100%; padding: 0.5em"></p>
<ul id="found"></ul>

"""


def setup(app):
    app.connect("source-read", add_messages)
    app.connect("source-read", link_to_sources)
    app.connect("env-get-outdated", lambda *_: ["errors"])  # it changes with the code


def add_messages(app, docname: str, source: list[str]) -> None:
    """Writes all messages of the code below those words of docs/errors.md that speak of them."""
    if docname == "errors":
        from docs.error_list import listing

        source[0] += FINDER + listing()


def link_to_sources(app, docname: str, source: list[str]) -> None:
    """Turns relative links that leave docs/ into addresses: of the repository in GitHub's CI, else of this folder."""
    folder = (DOCS / docname).parent
    source[0] = LINK.sub(lambda link: address(link, folder / link["target"]), source[0])


def address(link: re.Match, target: Path) -> str:
    """`link` as it is if its target is a page of the site or missing (then Sphinx warns), else as HTML."""
    file = target.resolve()
    if not file.exists() or file.is_relative_to(DOCS):
        return link[0]
    url = file.as_uri()
    if "GITHUB_REPOSITORY" in os.environ:
        server, repository, commit = (os.environ[f"GITHUB_{name}"] for name in ("SERVER_URL", "REPOSITORY", "SHA"))
        url = f"{server}/{repository}/blob/{commit}/{file.relative_to(ROOT)}"
    return f'<a href="{url}">{link["text"]}</a>'
