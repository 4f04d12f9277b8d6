"""What the pages name in passing is there: keys of the configuration, commands with overrides, and every method in the table of methods."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsb.config.explaining import known_keys
from fedsb.config.schema import Config
from fedsb.node.settings import NodeConfig
from strategies import STRATEGIES
from tests.docs.blocks import PAGES, ROOT
from tests.docs.composed import check
from tests.docs.shell import commands_in

KEYS = {*known_keys(Config), *known_keys(NodeConfig)}
GROUPS = {key.partition(".")[0] for key in KEYS if "." in key}
# What a method, a family, a task or a model has beside the schema: the checks of a run hold these.
FREE = ("adapter.options.", "method.options.", "data.task_options.", "cost.rank.", "model.config.")
NO_KEYS = {"train.keys", "train.shares", "train.survivors", "train.unmask", "federation.example.org", "federation.json"}
KEY = re.compile(r"[+~]*([a-z_]+(?:\.[a-z_0-9]+)+)(=.*)?")
COMMAND = re.compile(r"fedsb (run|cost|submit) [^|<]*=[^|<]*")


def spans(page: Path) -> Iterator[str]:
    """Yield what stands between backquotes, but for blocks."""
    prose = re.sub(r"^ *(`{3,}).*?^ *\1$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_key_that_a_page_names_is_one(page: Path) -> None:
    named = {match[1] for span in spans(page) for word in span.split() if (match := KEY.fullmatch(word))}
    said = {key for key in named if key.partition(".")[0] in GROUPS and not key.startswith(FREE)}
    assert said - KEYS - NO_KEYS == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_that_a_page_names_would_be_taken(page: Path) -> None:
    for span in filter(COMMAND.fullmatch, spans(page)):
        for command in commands_in(span):
            check(command)


def test_the_readme_has_a_row_for_every_method() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Methods\n")[2].partition("\n**What")[0]
    rows = set(re.findall(r"^\| `(\w+)`", section.partition("<!-- python")[0], re.MULTILINE))
    baselines = set(re.findall(r"`(?:method=)?(\w+)`", section.partition("Baselines")[2].partition("\n\n")[0]))
    assert set(STRATEGIES) <= rows | baselines
    assert rows <= set(STRATEGIES)
