"""The schemas are sound, and what holds every test's records against them finds what is wrong; tests/conftest.py has it run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from fedsb.run.records import RoundRecord
from fedsb.run.schema_files import KEY, MANIFEST, METRICS, SCHEMAS, SUMMARY, schema_of
from tests.report.made import make_records, make_summary
from tests.schemas import faults, faults_below

JOB = {"number": 0, "overrides": ["seed=0"], "label": "seed=0", "name": "seed=0", "config": "ab", "state": "waiting"}
SWEEP = {KEY: MANIFEST, "place": "/", "grid": {}, "code": "0" * 64, "versions": {}, "data": {}, "jobs": [JOB]}


def record(**changes: Any) -> dict[str, Any]:
    return json.loads(make_records()[2].to_json()) | changes


def summary(**changes: Any) -> dict[str, Any]:
    return make_summary(make_records(), "fed_sb", rank=8, seed=0, rounds=3) | changes


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one_and_goes_by_its_name(name: str) -> None:
    schema = schema_of(name)
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:fedsb:{name}"
    assert schema["properties"][KEY] == {"const": name}
    assert set(schema["required"]) <= schema["properties"].keys()


def test_a_record_is_described_key_by_key() -> None:
    assert list(schema_of(METRICS)["properties"]) == list(json.loads(RoundRecord(0).to_json()))
    assert set(schema_of(METRICS)["required"]) == schema_of(METRICS)["properties"].keys()
    assert set(summary()) <= schema_of(SUMMARY)["properties"].keys()


@pytest.mark.parametrize("value", [record(), summary(), SWEEP])
def test_what_is_written_is_as_described(value: dict[str, Any]) -> None:
    assert faults(value) == []


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (record(round="2"), "$.round"),
        (record(metrics={"accuracy": "high"}), "$.metrics.accuracy"),
        (record(colour="red"), "$"),
        (record(epsilon={"unit": "example"}), "$.epsilon"),
        (record(schema="metrics-0"), "there is no schema metrics-0"),
        (summary(epsilon_reason=None), "$"),
        (summary(factors_sha256="none"), "$.factors_sha256"),
        ({**SWEEP, "jobs": [{**JOB, "state": "asleep"}]}, "$.jobs[0].state"),
        ({**SWEEP, "jobs": [{**JOB, "colour": "red"}]}, "$.jobs[0]"),
    ],
)
def test_what_is_not_as_described_is_found_with_its_place(value: dict[str, Any], place: str, tmp_path: Path) -> None:
    [first, *_] = faults(value)
    assert first.startswith(place)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path = tmp_path / "deep" / "er" / "metrics.jsonl"
    path.write_text(json.dumps(record()) + "\n" + json.dumps(value) + '\n{"torn', encoding="utf-8")
    assert faults_below(tmp_path) == [f"{path}: {fault}" for fault in faults(value)]
    path.unlink()  # each test's folder is held against the schemas
