"""How `make docs` makes a site of these pages, with Sphinx; its source is the repository, into which they link."""

import re
from pathlib import Path

from sphinx.application import Sphinx

from hpclr.version import __version__

HERE = Path(__file__).parent

project = "hpclr"
author = "the hpclr developers"
release = __version__
copyright = author

root_doc = "docs/README"
_around = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "containers/README.md",
]
include_patterns = [*_around, *(f"docs/{page.name}" for page in HERE.iterdir() if page.suffix in (".md", ".rst"))]
suppress_warnings = ["misc.highlighting_failure"]  # equations in docstrings are no Python
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_typehints = "none"  # they stand in the signatures, short
napoleon_use_ivar = True
autodoc_member_order = "bysource"
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"hpclr {release}"


def add_contents(_: Sphinx, name: str, source: list[str]) -> None:
    """What the first page lists, in its tables and below, is what stands at the side of every page."""
    if name == root_doc:
        pages = re.findall(r"\]\(([\w-]+)\.md\)", source[0])
        around = ["/" + page.removesuffix(".md") for page in _around]
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join([*pages, "api", *around]) + "\n```\n"


def add_door(app: Sphinx, failure: Exception | None) -> None:
    """Whoever opens the folder comes to the first page."""
    if failure is None:
        door = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>{project}</title>\n'
        (Path(app.outdir) / "index.html").write_text(door, encoding="utf-8")


def mark_code(_: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """What a docstring sets apart by a blank line and four spaces is a program."""
    for number in range(len(lines) - 1, 0, -1):
        if lines[number].startswith("    ") and not lines[number - 1]:
            lines[number:number] = [".. code-block:: python", ""]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon's, which indents more
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_door)
