"""Laws of what lies on disk: records come back as they went, and one folder holds one run."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.run.folder import RunFolder, read_run
from fedsb.run.records import RoundRecord

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(max_size=12)
RECORDS = st.builds(
    RoundRecord,
    round=st.integers(0, 9),
    clients=st.lists(WORDS, max_size=3).map(tuple),
    failed=st.dictionaries(WORDS, WORDS, max_size=2),
    metrics=st.dictionaries(WORDS, NUMBERS, max_size=2),
    client_metrics=st.dictionaries(WORDS, st.dictionaries(WORDS, NUMBERS, max_size=2), max_size=2),
    train_loss=st.none() | NUMBERS,
    payload_up=st.integers(0, 2**62),
    exactness_gap=st.none() | NUMBERS,
    extras=st.dictionaries(WORDS, NUMBERS, max_size=2),
)


@settings(max_examples=30, deadline=None)
@given(RECORDS)
def test_json_round_trips_on_one_line(record: RoundRecord) -> None:
    line = record.to_json()
    assert "\n" not in line
    assert RoundRecord.from_json(line) == record


def test_what_json_lacks_becomes_null_and_comes_back_as_nan() -> None:
    record = RoundRecord(1, metrics={"pearson": math.nan}, train_loss=math.inf)
    raw = json.loads(record.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert raw["metrics"]["pearson"] is None
    back = RoundRecord.from_json(record.to_json())
    assert math.isnan(back.metrics["pearson"])
    assert back.train_loss is None


def test_a_key_of_a_later_version_is_ignored() -> None:
    assert RoundRecord.from_json('{"round": 4, "colour": "red"}') == RoundRecord(4)


def test_records_are_read_back_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    records = [RoundRecord(number, payload_up=number) for number in range(3)]
    for record in records:
        folder.append(record)
    assert read_run(folder.path).records == tuple(records)


def test_a_torn_last_line_costs_that_round_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.append(RoundRecord(0))
    with folder.metrics.open("a") as file:
        file.write(RoundRecord(1).to_json()[:20])
    assert read_run(folder.path).records == (RoundRecord(0),)


def test_a_repeated_round_counts_once_as_last_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for up in (5, 7):
        folder.append(RoundRecord(1, payload_up=up))
    assert read_run(folder.path).records == (RoundRecord(1, payload_up=7),)


@pytest.mark.parametrize("mark", ["config.yaml", "summary.json", "ledgers"])
def test_a_folder_of_another_run_is_refused(mark: str, tmp_path: Path) -> None:
    (tmp_path / mark).write_text("{}")
    with pytest.raises(UserError, match=rf"^output '.*' already holds a run \({mark}\); choose another output=…$"):
        RunFolder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [mark]


def test_a_folder_without_a_run_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text("started\n")
    assert RunFolder(tmp_path).log.read_text() == "started\n"


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"output '.*taken' can't be made \(File exists\); choose another output=…"):
        RunFolder(tmp_path / "taken")


def test_of_two_runs_that_start_together_one_gets_the_folder(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.write_config("seed: 1\n")
    with pytest.raises(UserError, match=r"already holds a run \(config.yaml\)"):
        second.write_config("seed: 2\n")
    assert first.config.read_text() == "seed: 1\n"
    assert [path.name for path in first.path.iterdir()] == ["config.yaml"]


KILLED_AS_IT_WRITES = """
import resource, signal, sys
from fedsb.run.folder import RunFolder

signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
RunFolder(sys.argv[1]).write_config("seed: 1\\n" * 100)
"""


def test_a_kill_in_the_middle_of_the_configuration_does_not_claim_the_folder(tmp_path: Path) -> None:
    """The kernel kills the process at its 101st byte."""
    killed = subprocess.run([sys.executable, "-c", KILLED_AS_IT_WRITES, str(tmp_path / "run")], cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGXFSZ
    assert any((tmp_path / "run").iterdir())
    folder = RunFolder(tmp_path / "run")
    folder.write_config("seed: 2\n")
    assert folder.config.read_text() == "seed: 2\n"


def test_a_file_system_without_hard_links_holds_one_run_a_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_of_two_runs_that_start_together_one_gets_the_folder(tmp_path)


def test_the_summary_is_whole_and_leaves_no_draft(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_summary({"metrics": {"accuracy": 0.5, "pearson": math.nan}})
    assert json.loads(folder.summary.read_text()) == {"metrics": {"accuracy": 0.5, "pearson": None}}
    assert [path.name for path in folder.path.iterdir()] == ["summary.json"]


def test_a_folder_without_records_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run \(metrics.jsonl is missing or empty\); give the output folder of a run"):
        read_run(tmp_path)
