"""Laws of what is printed: units, lines and tables that fit."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedsb.report.table import UNITS, epsilon_text, human_bytes, human_seconds, number, print_summary, round_line
from fedsb.run.records import RoundRecord
from tests.report.made import make_records, make_summary

RECORD = RoundRecord(
    round=2,
    clients=tuple(f"client-{i}" for i in range(10)),
    metrics={"accuracy": 0.9231, "macro_f1": 0.9204, "loss": 0.3112},
    payload_up=500_000,
    payload_down=500_000,
    exactness_gap=3.1e-8,
    wall_s=21.2,
)
LINE = "round 2/3  accuracy 0.923  macro_f1 0.920  loss 0.311  10 clients  up 500.0 kB  down 500.0 kB  gap 3.1e-08  21 s"


@given(st.integers(0, 10**17))
def test_bytes_lose_at_most_half_of_the_last_digit(count: int) -> None:
    text, unit = human_bytes(count).split()
    scale = 1000 ** UNITS.index(unit)
    assert abs(float(text) * scale - count) <= 0.05 * scale + 1e-6 * count
    assert float(text) < 1000


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9216, "9.2 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (2.5e9, "2.5 GB")],
)
def test_bytes_in_decimal_units(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.000"), (1.0, "1.000"), (-0.25, "-0.250"), (2e-5, "2e-05"), (12345.6, "1.235e+04"), (float("nan"), "nan")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_a_round_is_one_readable_line() -> None:
    assert round_line(RECORD, 3) == LINE


def test_a_line_names_failures_and_their_reasons() -> None:
    failed = {"client-3": "timed\nout", "client-4": "NaN in R", "c": "x", "d": "x", "e": "x"}
    line = round_line(replace(RECORD, failed=failed), 3)
    assert "5 failed (client-3: timed out; client-4: NaN in R; c: x; and 2 more)" in line
    assert "\n" not in line


def test_a_line_shows_what_the_round_has_and_no_more() -> None:
    assert round_line(RoundRecord(0, payload_one_off=4_400_000, wall_s=0.5), 10) == "round  0/10  one-off 4.4 MB  0.5 s"
    record = RoundRecord(1, clients=("a",), client_metrics={"a": {"accuracy": 0.5}, "b": {"accuracy": 1.0}}, train_loss=0.25)
    assert round_line(record, 1) == "round 1/1  on clients: accuracy 0.750  train loss 0.250  1 client  0.0 s"


def test_epsilon_is_told_with_all_that_it_depends_on() -> None:
    epsilon = {"unit": "example", "delta": 1e-5, "max": 3.0, "min": 2.5, "accountant": "prv", "simulated": True}
    assert epsilon_text({"epsilon": epsilon}) == "at most 3.00, at least 2.50 per example at delta 1.0e-05 (prv, simulated)"
    assert epsilon_text({"epsilon": None, "epsilon_reason": "un-noised start"}) == "not claimed (un-noised start)"


def printed(folder: str, *, width: int | None = None, terminal: bool = False) -> str:
    """Print the summary of a run to a string."""
    summary = make_summary(make_records()) | {"model": "some-hub-organisation/" + "a-very-long-model-name-" * 8}
    out = io.StringIO()
    print_summary(summary, folder, Console(file=out, width=width, force_terminal=terminal))
    return out.getvalue()


@pytest.mark.parametrize(("width", "terminal"), [(None, False), (300, False), (300, True), (60, True)])
def test_the_table_fits_and_loses_nothing(width: int | None, terminal: bool) -> None:
    folder = "/somewhere/" + "deep/" * 40
    text = printed(folder, width=width, terminal=terminal)
    *table, last = text.rstrip("\n").split("\n")
    assert last == f"run folder: {folder}"
    narrow = terminal and width is not None and width < 80
    if narrow:
        *table, fingerprint = table
        assert re.fullmatch("factors sha256: [0-9a-f]{64}", fingerprint)
    assert ("factors sha256" in "".join(table)) is not narrow
    widest = max(Console().render_str(line).cell_len for line in map(_unstyled, table))
    assert widest <= min(100, (width or 100) if terminal else 100)
    assert "…" not in text


def test_a_pipe_gets_plain_text(tmp_path: Path) -> None:
    text = printed(str(tmp_path))
    assert text.isascii()
    assert "\x1b" not in text
    assert "5.0 MB, without the one-off 553.0 kB" in text


def _unstyled(line: str) -> str:
    return "".join(part.partition("m")[2] if i else part for i, part in enumerate(line.split("\x1b[")))
