"""Shell lines as commands: words, without comments, continuations joined."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

BETWEEN = {"&&", "||", "|", ";", "&"}
ASSIGNED = re.compile(r"[A-Z_]+=.*")
SAID = "…"  # what the reader is to put in


def lines_in(text: str) -> list[str]:
    """Return the lines of a block, those that a backslash continues in one."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of each command, but for what is assigned before it and where its output goes."""
    for line in lines_in(text):
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        yield from _apart(list(words))


def _apart(words: Sequence[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for place, word in enumerate([*words, ";"]):
        if word in BETWEEN:
            if command:
                yield command
            command = []
        elif word not in (">", "<") and words[place - 1 : place] not in ([">"], ["<"]) and (command or not ASSIGNED.fullmatch(word)):
            command.append(word)
