"""The summary has every documented key, and its totals are sums over rounds."""

from __future__ import annotations

import json
import math
import platform

import pytest
import torch

import fedsb
from fedsb.report.series import largest_gap
from fedsb.report.summary import build_summary, versions
from fedsb.run.records import RoundRecord
from tests.report.made import TRAFFIC, make_records, make_summary

KEYS = {
    "method",
    "rounds",
    "clients",
    "seed",
    "model",
    "data",
    "rank",
    "trained_params",
    "metrics",
    "payload_up",
    "payload_down",
    "payload_one_off",
    "overhead",
    "exactness_gap",
    "gap_error",
    "held_gap",
    "held_gap_modules",
    "factors_sha256",
    "epsilon",
    "epsilon_reason",
    "wall_s",
    "versions",
    "failures",
    "payload_total",
    "payload_total_without_one_off",
}


def test_every_key_is_there_and_it_is_json() -> None:
    summary = make_summary(make_records())
    assert summary.keys() >= KEYS
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.parametrize("method", TRAFFIC)
def test_totals_are_sums_over_rounds(method: str) -> None:
    up, down, one_off, gap = TRAFFIC[method]
    summary = make_summary(make_records(method))
    assert (summary["payload_up"], summary["payload_down"], summary["payload_one_off"]) == (3 * up, 3 * down, one_off)
    assert summary["payload_total_without_one_off"] == 3 * (up + down)
    assert summary["payload_total"] == 3 * (up + down) + one_off
    assert summary["overhead"] == 3 * 5_210
    assert summary["exactness_gap"] == pytest.approx(gap * 1.9)
    assert summary["failures"] == 1
    assert summary["metrics"] == make_records(method)[-1].metrics


def test_a_run_that_stopped_early_says_so() -> None:
    summary = make_summary(make_records()[:2], rounds=3)
    assert (summary["rounds"], summary["rounds_done"]) == (3, 1)


@pytest.mark.parametrize(("gaps", "largest"), [([None, None], None), ([None, 0.0], 0.0), ([1e-8, 3e-8, 2e-8], 3e-8)])
def test_the_largest_gap(gaps: list[float | None], largest: float | None) -> None:
    assert largest_gap([RoundRecord(i, exactness_gap=gap) for i, gap in enumerate(gaps)]) == largest


@pytest.mark.parametrize("gaps", [(math.nan, 1.0), (1.0, math.nan)])
def test_a_gap_that_is_no_number_is_not_hidden(gaps: tuple[float, float]) -> None:
    found = largest_gap([RoundRecord(i, exactness_gap=gap) for i, gap in enumerate(gaps)])
    assert found is not None
    assert math.isnan(found)


def test_no_epsilon_without_a_reason() -> None:
    given = {"method": "m", "rounds": 1, "clients": 1, "seed": 0, "model": "m", "data": "d", "rank": 1, "trained_params": 1}
    common = {**given, "records": [], "factors_sha256": "", "wall_s": 0.0}
    with pytest.raises(ValueError, match="a run without epsilon must say why"):
        build_summary(**common, epsilon_reason=None)  # type: ignore[arg-type]
    epsilon = {"unit": "example", "delta": 1e-5, "max": 3.0, "min": 2.0, "accountant": "prv", "simulated": True}
    summary = build_summary(**common, epsilon=epsilon)  # type: ignore[arg-type]
    assert (summary["epsilon"], summary["epsilon_reason"]) == (epsilon, None)


def test_versions_are_those_that_run() -> None:
    found = versions()
    assert (found["fedsb"], found["python"], found["torch"]) == (fedsb.__version__, platform.python_version(), torch.__version__)
    assert {"flwr", "transformers"} <= found.keys()
