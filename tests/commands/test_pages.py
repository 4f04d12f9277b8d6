"""A page for every command, and flags that nobody has."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedsb.cli import COMMANDS, main
from fedsb.commands.pages import PAGES


def test_every_command_has_a_page() -> None:
    assert set(PAGES) == set(COMMANDS)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", sorted(PAGES))
def test_help_shows_it_whatever_else_is_given(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, "nonsense", flag])
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: fedsb {command} ")
    assert not err
    assert max(map(len, out.splitlines())) <= 140
    assert ("  method=       abba, " in out) is (command in ("run", "submit", "cost"))


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("fedsb 0.")


def test_a_flag_that_nobody_has_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["run", "--mulitrun", "seed=1,2"])
    assert capsys.readouterr().err.startswith("error: unknown flag '--mulitrun' (did you mean '--multirun'?); choose from ")


@pytest.mark.slow
def test_help_waits_for_no_import() -> None:
    code = "import sys; from fedsb.commands.pages import page; page('run'); print(sorted({'torch', 'hydra', 'ray'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
