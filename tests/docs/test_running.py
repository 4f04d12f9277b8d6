"""What the pages give to run is run, page by page in one folder, as a reader would: later blocks use what earlier ones have left."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsb.cli import main
from tests.commands.calls import handlers_given_back
from tests.docs.blocks import ROOT, RUN, Block, all_blocks
from tests.docs.said import like, plain
from tests.docs.shell import BETWEEN, lines_in

TOOLS = f'set -eo pipefail; fedsb() {{ "{sys.executable}" -P -m fedsb.cli "$@"; }}; python() {{ "{sys.executable}" -P "$@"; }}\n'


def run_line(line: str) -> None:
    """Run a line: a command of fedsb in this process, which has imported all that it takes, anything else in a shell."""
    command, *rest = shlex.split(line, comments=True)
    if command != "fedsb" or {*rest} & {*BETWEEN, ">"}:
        subprocess.run(["bash", "-c", TOOLS + line], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.DEVNULL)
        return
    with pytest.raises(SystemExit) as done:
        main(rest)
    assert not done.value.code, line


def run_shell(block: Block, names: dict[str, Any]) -> None:
    """Run the lines of a block."""
    for line in lines_in(block.text):
        if shlex.split(line, comments=True):
            run_line(line)


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block with what earlier ones of its page have defined."""
    exec(compile("\n" * block.line + block.text, block.page, "exec"), names)


def run_console(block: Block, names: dict[str, Any]) -> None:
    """Hold what a command that is refused says against what the block shows of it; ``…`` is anything."""
    first, *shown = block.text.splitlines()
    words, said = shlex.split(first.removeprefix("$ ")), io.StringIO()
    with redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        for key, _, value in (word.partition("=") for word in words[: words.index("fedsb")]):
            patch.setenv(key, str(Path(value).absolute()))
        with pytest.raises(SystemExit) as done:
            main(words[words.index("fedsb") + 1 :])
    assert done.value.code == 2, block.place
    assert re.fullmatch(like(" ".join(shown)), plain(said.getvalue())), f"{block.place}: {said.getvalue()}"


RUNNERS: Mapping[str, Callable[[Block, dict[str, Any]], None]] = {"sh": run_shell, "console": run_console, "python": run_python}


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute of one core, which beside other work may take long
def test_what_is_there_to_run_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    names: dict[Path, dict[str, Any]] = {}
    with handlers_given_back(), torch.random.fork_rng():
        for block in all_blocks():
            if block.kind == RUN and block.language in RUNNERS:
                print(block.place, flush=True)
                RUNNERS[block.language](block, names.setdefault(block.page, {"__name__": block.page.stem}))
