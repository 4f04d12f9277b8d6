"""The code blocks of the pages, and what a mark before one says of it.

A block runs, unless an HTML comment right before its fence says why not; nobody who reads the page sees the comment:

- ``<!-- composed, not run: 20 minutes -->``: each command is read by what would read it, with all of its overrides, and nothing is run;
- ``<!-- not run: REASON -->``: nobody looks at it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# What a person goes through first stands first: later pages use what it has left.
PAGES = (
    *(path for path in (ROOT / "docs" / "quick_start.md",) if path.is_file()),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "quick_start.md"),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
)
RUN, COMPOSED, LEFT = "run", "composed, not run", "not run"
CODE = ("sh", "console", "python", "yaml", "toml", "json")
SHOWN = ("text",)
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)$")
MARK = re.compile(rf"^ *<!-- ({COMPOSED}|{LEFT}): (.*\S) -->$")


class Block(NamedTuple):
    """A code block: where it is, its language, what is done with it, why nothing else is, and its lines."""

    page: Path
    line: int
    language: str
    kind: str
    reason: str
    text: str

    @property
    def place(self) -> str:
        """Where it is."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_in(page: Path, text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page.

    Raises:
        ValueError: a fence is not closed, or a mark stands before no block.
    """
    lines = text.splitlines()
    opened: tuple[int, re.Match[str]] | None = None
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if opened is None:
            if fence:
                opened = (number, fence)
            elif MARK.match(line) and not FENCE.match("".join(lines[number : number + 1])):
                raise ValueError(f"{page.name}:{number}: no block behind the mark")
        elif fence and fence["fence"].startswith(opened[1]["fence"]) and not fence["info"].strip():
            yield _block(page, lines, opened, number)
            opened = None
    if opened:
        raise ValueError(f"{page.name}:{opened[0]}: the block does not end")


def _block(page: Path, lines: list[str], opened: tuple[int, re.Match[str]], end: int) -> Block:
    begin, fence = opened
    mark = MARK.match(lines[begin - 2]) if begin > 1 else None
    kind, reason = mark.groups() if mark else (RUN, "")
    text = "\n".join(line.removeprefix(fence["indent"]) for line in lines[begin : end - 1])
    return Block(page, begin, fence["info"].strip(), kind, reason, text)


def all_blocks() -> list[Block]:
    """Return the blocks of all pages; those of the site's own directives (``{include}``, …) are no code."""
    found = [block for page in PAGES for block in blocks_in(page, page.read_text(encoding="utf-8"))]
    return [block for block in found if not block.language.startswith("{")]
