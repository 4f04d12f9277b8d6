"""The messages that the page of errors quotes are those of the code; those of its console blocks are provoked by ``test_running.py``."""

from __future__ import annotations

import pytest

from tests.docs.blocks import ROOT, blocks_in
from tests.docs.said import is_said, like

PAGE = ROOT / "docs" / "faq.md"
BLOCKS = list(blocks_in(PAGE, PAGE.read_text(encoding="utf-8")))
MESSAGES = [line for block in BLOCKS if block.language == "text" for line in block.text.splitlines()]


@pytest.mark.parametrize("message", MESSAGES)
def test_what_is_quoted_is_said(message: str) -> None:
    assert message.startswith("error: ")
    assert is_said(message)


def test_what_nothing_says_is_found() -> None:
    assert not is_said("error: the run in '…' is under way in another folder; end that one first")
    assert not is_said("error: nothing in the sources says that")


def test_a_pattern_takes_anything_for_what_is_put_in() -> None:
    assert like("a … (b)") == r"a\ .*\ \(b\)"


def test_most_messages_are_provoked() -> None:
    assert sum(block.language == "console" for block in BLOCKS) > len(MESSAGES)
