"""What tests leave behind, held against the published schemas: every record, summary and manifest that names one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from fedsb.run.schema_files import KEY, SCHEMAS, schema_of

FILES = ("metrics.jsonl", "summary.json", "manifest.json")


def closed(schema: Any) -> Any:
    """Return a schema that takes no other keys than those it names: readers may meet more, but what is written now is described."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    own = schema.get("type") == "object" and "additionalProperties" not in schema and ("properties" in schema or "allOf" in schema)
    return inner | ({"unevaluatedProperties": False} if own and "allOf" in schema else {"additionalProperties": False} if own else {})


@cache
def validators() -> dict[str, Draft202012Validator]:
    """Return what holds a value against each schema, by its name."""
    found = {name: schema_of(name) for name in SCHEMAS}
    # What another schema adds to is left open there, and closed by that one.
    registry = Registry().with_resources((schema["$id"], Resource.from_contents(schema)) for schema in found.values())
    return {name: Draft202012Validator(closed(schema), registry=registry) for name, schema in found.items()}


def faults(value: Any) -> list[str]:
    """Return what is wrong with a value that names its schema; one that names none is laid by a test's own hand."""
    if not isinstance(value, dict) or KEY not in value:
        return []
    if value[KEY] not in validators():
        return [f"there is no schema {value[KEY]}"]
    return [f"{error.json_path}: {error.message[:200]}" for error in validators()[value[KEY]].iter_errors(value)]


def faults_below(folder: Path) -> list[str]:
    """Return what is wrong with the records of runs and sweeps anywhere in a folder."""
    return [f"{path}: {fault}" for path in _files(folder) for value in _values(path) for fault in faults(value)]


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place) / name for name in FILES if name in names)


def _values(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8", errors="replace")
    # A line that a kill has torn is none yet.
    for each in text[: text.rfind("\n") + 1].splitlines() if path.suffix == ".jsonl" else [text]:
        try:
            yield json.loads(each)
        except ValueError:  # damaged by a test
            continue
