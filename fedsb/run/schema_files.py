"""The published schemas of what a run and a sweep leave behind: JSON Schema, draft 2020-12, in the wheel.

Each record, summary and manifest names its own under ``schema``. Keys may be added to a schema; whatever else changes is a new one, by a
name with the next number, and the old one stays.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

METRICS, SUMMARY, MANIFEST = "metrics-1", "summary-1", "manifest-1"
SCHEMAS = (METRICS, SUMMARY, MANIFEST)
KEY = "schema"


def schema_of(name: str) -> dict[str, Any]:
    """Return the schema of that name, one of :data:`SCHEMAS`; they refer to one another by their ``$id``.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    found: dict[str, Any] = json.loads(files("fedsb.run").joinpath("schemas", f"{name}.json").read_text(encoding="utf-8"))
    return found
