"""What the tests of commands share: a command's call, and the one line of a mistake."""

from __future__ import annotations

from collections.abc import Callable

Call = Callable[..., tuple[int, str, str]]


def first_line(text: str) -> str:
    """Return the only line of an error message."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    return lines[0]
