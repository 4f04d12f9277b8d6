"""Every code block of the README and of the pages runs, is composed, or says why nobody looks at it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from yaml import YAMLError

from fedsb.core.errors import UserError
from tests.docs.blocks import CODE, COMPOSED, LEFT, RUN, SHOWN, Block, all_blocks, blocks_in
from tests.docs.composed import check
from tests.docs.read import read_toml, read_yaml
from tests.docs.shell import commands_in

BLOCKS = all_blocks()
READERS: Mapping[str, Callable[[str, Path], object]] = {"yaml": read_yaml, "toml": read_toml, "json": lambda text, folder: json.loads(text)}


def ids(block: Block) -> str:
    return block.place


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.language in (*CODE, *SHOWN), "name the language behind the fence; text: what is shown and is no code"
    assert block.kind == RUN or block.language in CODE, "a mark is for code"
    assert block.kind != COMPOSED or block.language == "sh", "commands alone are composed"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "sh" and block.kind != LEFT], ids=ids)
def test_commands_are_such_as_would_be_taken(block: Block) -> None:
    for command in commands_in(block.text):
        check(command)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in READERS and block.kind == RUN], ids=ids)
def test_what_is_written_down_is_read_by_its_reader(block: Block, tmp_path: Path) -> None:
    READERS[block.language](block.text, tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "fedsb run rang=8",
        "fedsb run method=fedex_lora federation.secure_sum=true",
        "fedsb run -m method=fed_sb,fedavg_lore",
        "fedsb run --mult rank=4",
        "fedsb submit home privacy.epsilonn=3",
        "fedsb cost cost.rank.fedsb=3",
        "fedsb federation begin server",
        "fedsb report",
        "fedsb raport sweep",
        "python scripts/bench/cores.py",
        "python scripts/bench/gpu.py --dray",
        "python scripts/storm.py --kills 3 rang=4",
        "make tests",
        "pip install -e '.[llmm]'",
        "fedzb run",
    ],
)
def test_a_command_that_would_be_refused_is_found(command: str) -> None:
    [words] = commands_in(command)
    with pytest.raises(UserError):
        check(words)


@pytest.mark.parametrize("text", ["client: a\ndata: {path: a.csv, lable: x}", "secure: {require: true}", "train: {lrr: 0.1}", "rank: [1"])
def test_a_file_that_would_be_refused_is_found(text: str, tmp_path: Path) -> None:
    with pytest.raises((UserError, YAMLError)):
        read_yaml(text, tmp_path)


def test_marks_and_blocks_are_told_apart(tmp_path: Path) -> None:
    text = "a\n<!-- not run: takes a cluster -->\n```sh\nsrun x\n```\n\n- b\n  ```python\n  x = 1\n\n  y = 2\n  ```\n"
    first, second = blocks_in(tmp_path / "a.md", text)
    assert (first.line, first.language, first.kind, first.reason, first.text) == (3, "sh", LEFT, "takes a cluster", "srun x")
    assert (second.language, second.kind, second.text) == ("python", RUN, "x = 1\n\ny = 2")


@pytest.mark.parametrize("text", ["<!-- not run: x -->\n\n```sh\na\n```", "```sh\na", "<!-- composed, not run: x -->\na"])
def test_a_mark_without_a_block_and_a_block_without_an_end_are_found(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.md:1"):
        list(blocks_in(tmp_path / "a.md", text))


def test_a_line_becomes_its_commands() -> None:
    text = "mkdir a && cd a   # b\nHOME=x fedsb run 'k=f(a,b)' \\\n  rank=2 > out.txt &\n"
    assert list(commands_in(text)) == [["mkdir", "a"], ["cd", "a"], ["fedsb", "run", "k=f(a,b)", "rank=2"]]
