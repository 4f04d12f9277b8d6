"""The log of a run: its level, full disks, and a bar that stays whole."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fedsb.core.logs import IN_FILE_ALONE, MOST_LINES, early_lines, log_to_screen, overheard, retell, run_log
from fedsb.report.progress import Progress

LOG = logging.getLogger("fedsb.tests")


@pytest.fixture
def screen() -> Iterator[None]:
    """Take the root logger over, and give its handlers back."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    log_to_screen()
    yield
    root.handlers[:] = handlers


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("level", "told"), [("debug", "dwi"), ("info", "wi"), ("warning", "w")])
def test_the_level_decides_what_is_told(level: str, told: str, tmp_path: Path) -> None:
    with run_log(tmp_path / "run.log", level):
        LOG.debug("d")
        LOG.warning("w …")
        LOG.info("i")
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert "".join(line.split()[3] for line in lines) == told


def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with run_log(Path("/dev/full")):
        LOG.info("a line")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("screen")
def test_warnings_go_to_the_screen_unless_people_see_them_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    LOG.info("quiet")
    LOG.warning("loud")
    LOG.error("said elsewhere", extra=IN_FILE_ALONE)
    assert capsys.readouterr().err.splitlines()[0].endswith(" WARNING loud")


@pytest.mark.usefixtures("screen")
@pytest.mark.parametrize("terminal", [True, False])
def test_a_warning_goes_above_the_bar_or_into_the_file_that_was_asked_for(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, error = io.StringIO(), Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", error)
    with Progress(1, Console(file=shown, force_terminal=True, width=100)) as progress:
        progress.begin(1, ["a", "b"])
        LOG.warning("something happened")
    assert ("something happened" in shown.getvalue()) is terminal
    assert ("something happened" in error.getvalue()) is not terminal
    assert sys.stderr is error


@pytest.mark.usefixtures("screen")
def test_what_another_process_has_logged_is_told_with_a_name_as_if_it_had_been_logged_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with overheard(logging.INFO) as lines:
        LOG.debug("not asked for")
        LOG.info("100 %s of it", "%")
        LOG.warning("loud")
        logging.getLogger("another.package").error("not ours")
    assert [line.text for line in lines] == ["100 % of it", "loud"]
    capsys.readouterr()
    with run_log(tmp_path / "run.log"):
        retell(lines, "client-1")
    told = [line.split(" ", 2)[2] for line in (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()]
    assert told == ["INFO client-1: 100 % of it", "WARNING client-1: loud"]
    assert [line.split(" ", 2)[2] for line in capsys.readouterr().err.splitlines()] == ["WARNING client-1: loud"]


def test_an_answer_brings_along_no_flood_of_lines() -> None:
    with overheard(logging.INFO) as lines:
        for _ in range(MOST_LINES + 5):
            LOG.info("again")
    assert len(lines) == MOST_LINES


def test_what_is_logged_before_there_is_a_log_comes_into_it_once_and_in_its_place(tmp_path: Path) -> None:
    with early_lines("info") as early:
        LOG.debug("not asked for")
        LOG.warning("early")
        with run_log(tmp_path / "run.log", early=early):
            LOG.info("later")
        with run_log(tmp_path / "run.log", early=early):
            LOG.info("again")
    told = [line.split(" ", 2)[2] for line in (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()]
    assert told == ["WARNING early", "INFO later", "INFO again"]
