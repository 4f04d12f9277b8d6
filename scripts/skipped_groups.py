"""Pytest plugin: a group of tests that was skipped as a whole is a failure, for nothing of it was tested.

Groups are the markers ``slow`` and ``gpu`` and the folders below ``tests``. ``gpu`` may be skipped where there is no GPU.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

OPTION = "--fail-if-group-skipped"
MARKERS = ("slow", "gpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(OPTION, action="store_true", help="fail if every test of a group was skipped")


class SkippedGroups:
    """Counts what ran and what was skipped, by group, from the reports: all that pytest-xdist's controller sees of the tests."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: at its call, or where it was skipped before."""
        if report.when == "call" or report.skipped:
            markers = {marker for marker in MARKERS if marker in report.keywords}
            (self.skipped if report.skipped else self.ran).update(markers or {_folder(report)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a file that skips itself as a test that was skipped."""
        if report.skipped:
            self.skipped.update({_folder(report)})

    def untested(self) -> list[str]:
        """Return the groups of which nothing ran."""
        return sorted(group for group in self.skipped if not self.ran[group] and (group != "gpu" or _has_gpu()))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turn a pass into a failure where a group went untested."""
        if self.untested() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the groups."""
        for group in self.untested():
            terminalreporter.write_line(f"FAILED group '{group}': all its {self.skipped[group]} tests were skipped", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Count only where asked to, and where all reports come together."""
    if config.getoption(OPTION) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkippedGroups())


def _folder(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(Path(report.nodeid.partition("::")[0]).parent)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
