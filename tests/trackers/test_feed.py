"""Trackers get what the records hold and nothing else, and none of them ends a run."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedsb.config.checks import TRACKERS as KNOWN
from fedsb.run.folder import records_in
from fedsb.run.records import RoundRecord
from fedsb.trackers import TRACKERS, Feed, Tracker
from fedsb.trackers.numbers import identity_of, numbers_of
from tests.commands.calls import Call, first_line
from tests.report.made import make_records, make_summary


class Keeping:
    """A tracker that keeps what it gets; ``at`` says what it stumbles over."""

    dates: ClassVar[bool] = False
    at: ClassVar[str] = ""

    def __init__(self, folder: Path) -> None:
        self.got: list[Any] = []
        self._do("open", folder)

    def _do(self, what: str, value: object) -> None:
        if self.at == what:
            raise ConnectionError(f"no {what}\nat all")
        self.got.append(value)

    def record(self, record: RoundRecord) -> None:
        self._do("record", record)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._do("finish", summary)

    def close(self, *, whole: bool) -> None:
        self._do("close", whole)


class Dated(Keeping):
    dates = True


def fed(kind: type[Keeping], folder: Path, records: list[RoundRecord], *, at: str = "", before: int = 0) -> list[Any]:
    """Feed a tracker that stumbles over ``at``, and return all that it got."""
    made: list[Keeping] = []

    def maker(place: Path) -> Tracker:
        made.append(type("Stumbling", (kind,), {"at": at})(place))
        return made[-1]

    with Feed({"mine": maker}, folder) as feed:
        feed.begin(records[:before])
        for record in records[before:]:
            feed.record(record)
        feed.finish({"method": "m"})
    return made[0].got if made else []


def test_the_names_that_a_configuration_takes_are_those_of_the_trackers() -> None:
    assert tuple(TRACKERS) == KNOWN


def test_a_tracker_gets_what_an_earlier_process_has_left_then_each_record_then_the_summary(tmp_path: Path) -> None:
    records = make_records()
    assert fed(Keeping, tmp_path, records, before=2) == [tmp_path, *records, {"method": "m"}, True]


@pytest.mark.parametrize("at", ["open", "record", "finish", "close"])
def test_one_that_breaks_is_told_once_and_the_run_goes_on(at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    got = fed(Keeping, tmp_path, make_records(), at=at)
    [said] = caplog.records
    assert (said.levelno, said.getMessage()) == (
        logging.WARNING,
        f"tracker mine failed (ConnectionError: no {at} at all); the run goes on without it",
    )
    assert len(got) == {"open": 0, "record": 1, "finish": 5, "close": 6}[at]


class Asking(Keeping):
    def _do(self, what: str, value: object) -> None:
        assert not sys.stdin.isatty()
        input("key? ")


def test_one_that_would_ask_a_person_for_something_asks_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO("yes\n" * 9)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert fed(Asking, tmp_path, make_records()) == []
    assert [record.getMessage()[:34] for record in caplog.records] == ["tracker mine failed (EOFError: EOF"]
    assert (sys.stdin, terminal.tell()) == (terminal, 0)


def test_one_whose_stamps_cannot_be_kept_from_it_gets_nothing_where_times_may_tell_of_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timeless = [replace(record, wall_s=None, cpu_s=None) for record in make_records()]
    assert fed(Dated, tmp_path, timeless) == [tmp_path, False]
    assert len(caplog.records) == 1
    assert "stamps all with the time" in caplog.text
    caplog.clear()
    assert fed(Keeping, tmp_path, timeless)[1:-2] == timeless
    assert not caplog.records


def test_numbers_are_those_of_the_line_and_no_others() -> None:
    record = replace(make_records()[2], epsilon={"max": 1.5, "simulated": True, "clients": {"a-b": {"delta": 1e-5}}}, gap_error=None)
    found = numbers_of(record)
    line = json.loads(record.to_json())
    assert found["metrics/accuracy"] == line["metrics"]["accuracy"]
    assert (found["clients"], found["failed"], found["epsilon/max"], found["epsilon/clients/a-b/delta"]) == (9, 1, 1.5, 1e-5)
    assert {name.split("/")[0] for name in found} <= line.keys() - {"schema", "round", "measured_by", "epsilon_reason", "gap_error"}
    assert "epsilon/simulated" not in found
    assert identity_of(make_summary(make_records()))["method"] == "fed_sb"


def test_clients_whose_names_a_tracker_would_change_keep_them_apart() -> None:
    """Owners that a column names: none is taken for another, for a path, or for what lies above another's."""
    names = ["a/b", "a", "a@b", "a#b", "a b", "a_b", ".", "..", "https://x.org/", "söder", "x" * 300]
    record = replace(make_records()[0], client_metrics={}, held_out={name: i for i, name in enumerate(names)})
    found = [name.removeprefix("held_out/") for name in numbers_of(record) if name.startswith("held_out/")]
    assert len({*found}) == len(names)
    assert all(re.fullmatch(r"[\w.-]{1,100}", name) and name.strip(".") for name in found)
    assert [name for name in found if name in names] == ["a", "a_b", "söder"]


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_is_not_installed_costs_a_warning(
    name: str, call: Callable[..., tuple[int, str, str]], quick: list[str], tmp_path: Path
) -> None:
    if find_spec(name):
        pytest.skip(f"{name} is installed here")
    status, _, err = call("run", *quick, "federation.num_rounds=1", f"trackers=[{name}]", "output=run")
    assert status == 0
    said = [line for line in err.splitlines() if "WARNING" in line]
    assert len(said) == 1
    assert f"WARNING tracker {name} is not installed here" in said[0]
    assert said[0].endswith(f"pip install 'fedsb[{name}]'; the run goes on without it")
    assert len(records_in(tmp_path / "run" / "metrics.jsonl")) == 2
    assert said[0].partition(" WARNING ")[2] in (tmp_path / "run" / "run.log").read_text(encoding="utf-8")


def test_a_tracker_that_nobody_knows_is_a_mistake(call: Call) -> None:
    status, _, err = call("run", "trackers=[tensorbord]")
    assert status == 2
    assert first_line(err).startswith("error: unknown tracker in trackers 'tensorbord' (did you mean 'tensorboard'?)")
