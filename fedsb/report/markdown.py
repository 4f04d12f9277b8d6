"""Pieces of a report in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedsb.report.table import metric_text


def document(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """Return a whole document: title, lead, and sections by heading."""
    parts = [f"# {title}", lead, *(f"## {heading}\n\n{text}" for heading, text in sections.items())]
    return "\n\n".join(parts) + "\n"


def write(path: Path, text: str) -> Path:
    """Write a text and return where it lies."""
    path.write_text(text, encoding="utf-8")
    return path


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cell_text(value) for value in line)} |" for line in lines)


def cell_text(value: object) -> str:
    """Return a value as one line that leaves the table whole."""
    return " ".join(str(value).replace("|", "\\|").split())


def or_dash(value: float | None, name: str = "") -> str:
    """Write a metric, by its name where it has one, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else metric_text(name, value)
