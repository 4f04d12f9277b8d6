"""A page for every command, and flags that nobody has."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from fedsb.cli import COMMANDS, main
from fedsb.commands.federation import WHAT
from fedsb.commands.flags import FLAGS, flags_in, names_of, overrides_in, with_values
from fedsb.commands.pages import PAGES, USAGE
from fedsb.config.compose import load
from fedsb.config.overrides import sweep_jobs
from fedsb.core.errors import UserError

EXAMPLE = re.compile(r"^  fedsb ([^\[\]|]+?)(?:   .*)?$", re.MULTILINE)
EXAMPLES = [shlex.split(found) for page in (USAGE, *PAGES.values()) for found in EXAMPLE.findall(page) if "KEY=VALUE" not in found]


def test_every_command_has_a_page() -> None:
    assert set(PAGES) == set(COMMANDS)
    assert all(f"\n  fedsb {command} " in USAGE for command in COMMANDS)
    assert {command.split()[0] for command in FLAGS} == set(COMMANDS)
    assert {command.split()[1] for command in FLAGS if " " in command} == set(WHAT)


@pytest.mark.parametrize("command", sorted(PAGES))
def test_a_page_has_the_flags_that_there_are_and_no_others(command: str) -> None:
    """Lines of other programs are theirs."""
    own = "\n".join(line for line in PAGES[command].splitlines() if not line.startswith("  flower-"))
    told = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", own)) - {"--help"}
    assert told == {name for each in FLAGS if each.split()[0] == command for name in names_of(each)}


@pytest.mark.parametrize("command", sorted(PAGES))
def test_a_page_has_an_example(command: str) -> None:
    assert any(example[0] == command for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=" ".join)
def test_the_command_line_takes_the_examples(example: list[str]) -> None:
    command, *rest = example
    if command == "run":
        flags_in(rest)
        given = overrides_in(rest)
    else:
        what = rest.pop(0) if command == "federation" else ""
        given, _ = with_values(f"{command} {what}".strip(), rest)
    overrides = [text for text in given if "=" in text and not text.startswith(("resume=", "cost.rank."))]
    for job in sweep_jobs(overrides):
        load(job)


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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cfg", "jobs"], "unknown --cfg value 'jobs' (did you mean 'job'?); choose from all, hydra, job"),
        (["--cfg"], "--cfg needs a value"),
        (["-m=1"], "-m takes no value"),
        # Hydra's own, which would lead past the checks.
        (["--config-dir", "mine"], "unknown flag '--config-dir'"),
        (["--experimental-rerun", "x"], "unknown flag '--experimental-rerun'"),
    ],
)
def test_a_flag_that_is_used_wrongly_is_one_line(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        flags_in(flags)


@pytest.mark.parametrize("given", [["--info"], ["--info", "seed=3"], ["seed=3", "--info=all"], ["--info", "config", "seed=3"]])
def test_a_value_that_may_follow_is_told_from_an_override(given: list[str]) -> None:
    assert [*flags_in(given), *overrides_in(given)].count("seed=3") == ("seed=3" in given)
    assert "config" not in overrides_in(given)


@pytest.mark.slow
def test_help_waits_for_no_import() -> None:
    code = "import sys; from fedsb.commands.pages import page; page('run'); print(sorted({'torch', 'hydra', 'ray'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
