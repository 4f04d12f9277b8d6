"""The site of these pages, by Sphinx with furo and MyST: ``make docs``.

What readers of GitHub find in the README, or in CONTRIBUTING.md, is included from there, so that nothing is said twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "fedsb"
version = release = version_of("fedsb")
copyright = "the fedsb authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
suppress_warnings = ["myst.header"]  # what is included begins below its page's title
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True  # else attributes stand there twice
napoleon_use_rtype = False

html_theme = "furo"
html_title = "fedsb"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["site.css", "site.js"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]

# Which page holds what lies outside of this folder.
PAGES: Mapping[str, str] = {"README.md#across-machines": "trial.md", "CONTRIBUTING.md": "extend.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#]*)(#[^)]*)?\)")


def as_here(text: str, folder: Path) -> str:
    """Return a text with its links as from here; a folder, of which there is no page, becomes its name."""

    def changed(link: re.Match[str]) -> str:
        mark, said, target, anchor = link[1], link[2], link[3], link[4] or ""
        if ":" in target or not target:
            return link[0]
        place = (folder / target).resolve()
        if place.is_dir():
            return f"`{said}`"
        there = place.relative_to(HERE) if place.is_relative_to(HERE) else f"../{place.relative_to(ROOT)}"
        return f"{mark}[{said}]({PAGES.get(f'{there}{anchor}'.removeprefix('../'), f'{there}{anchor}')})"

    return LINK.sub(changed, text)


class Generated(SphinxDirective):
    """Lines of reStructuredText that the code tells."""

    def lines(self) -> Iterator[str]:
        """Yield them."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Parse them where the directive stands."""
        node = nodes.container()
        self.state.nested_parse(StringList(list(self.lines()), source=self.get_location()), self.content_offset, node)
        return node.children


class Methods(Generated):
    """The class of every method, in the order of the table of methods."""

    def lines(self) -> Iterator[str]:
        """Yield a heading and the module's text and class for each."""
        from strategies import STRATEGIES

        for name, strategy in STRATEGIES.items():
            yield from (f".. rubric:: ``{name}``", "", f".. automodule:: {strategy.__module__}", "   :no-index:", "")
            shown = "" if "__init__" in vars(strategy) else "(**options)"  # those of LowRankStrategy
            yield from (f".. autoclass:: {strategy.__module__}.{strategy.__qualname__}{shown}", "   :no-index-entry:", "")


class Codes(Generated):
    """What a client may say when it does not answer."""

    def lines(self) -> Iterator[str]:
        """Yield a row a code."""
        from fedsb.privacy.codes import CODES

        yield from (".. list-table::", "   :header-rows: 1", "", "   * - code", "     - what the server shows")
        for code in CODES.values():
            yield from (f"   * - {code.number}", f"     - {code.text}")


class Groups(Generated):
    """The files of the configuration's groups, with the comments of all keys; of a group of many, its names."""

    MOST = 4

    def lines(self) -> Iterator[str]:
        """Yield each file."""
        for group in sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir()):
            files = sorted(group.glob("*.yaml"))
            yield from (
                f".. rubric:: ``{group.name}``",
                "",
                f"``conf/{group.name}/``: " + ", ".join(f"``{file.stem}``" for file in files),
                "",
            )
            for file in files if len(files) <= self.MOST else ():
                yield from (f".. literalinclude:: ../conf/{group.name}/{file.name}", "   :language: yaml", f"   :caption: {file.stem}", "")


def setup(app: Sphinx) -> dict[str, Any]:
    """Add what these pages need beside the extensions."""
    app.add_directive("methods", Methods)
    app.add_directive("codes", Codes)
    app.add_directive("groups", Groups)

    def read(_: Sphinx, name: str, source: list[str]) -> None:
        source[0] = as_here(source[0], HERE)

    def included(_: Sphinx, path: Path, parent: str, source: list[str]) -> None:
        source[0] = as_here(source[0], (HERE / path).resolve().parent)

    app.connect("source-read", read)
    app.connect("include-read", included)
    return {"parallel_read_safe": True}
