"""What the code may say: every text in its sources, with … where it puts something in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

from tests.docs.blocks import ROOT
from tests.docs.shell import SAID

PACKAGES = ("fedsb", "strategies", "clients")
LEAST = 20  # letters that a message has to have beside what is put in


def plain(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())


def like(shown: str) -> str:
    """Return the pattern of a text in which … is anything."""
    return ".*".join(map(re.escape, plain(shown).split(SAID)))


@cache
def texts() -> tuple[str, ...]:
    """Return all texts in the sources."""
    return tuple(text for package in PACKAGES for path in (ROOT / package).rglob("*.py") for text in _texts(path.read_text("utf-8")))


def _texts(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield plain("".join(part.value if isinstance(part, ast.Constant) else SAID for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield plain(node.value)


def is_said(message: str) -> bool:
    """Tell whether a message is a text of the sources, or the beginning of one; what is put into either may be … or stand there."""
    own = re.sub(r"^error: (the run stopped: )?", "", plain(message))
    assert _letters(own) >= LEAST or own.count(SAID) == 2, own
    return any(re.match(like(own), text) or (_letters(text) >= LEAST and re.fullmatch(like(text), own)) for text in texts())


def _letters(text: str) -> int:
    return len(text.replace(SAID, ""))
