"""The classes of a run, so that people see at its start what is told apart."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

SHOWN = 20


def class_lines(labels: Sequence[str]) -> Iterator[str]:
    """Yield the number and the names of the classes, and a remark on names that look alike; nothing where there are none."""
    if not labels:
        return
    more = f", and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    yield f"{len(labels)} classes: {_quoted(labels[:SHOWN])}{more}"
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(_essence(label), []).append(label)
    if alike := [group for group in groups.values() if len(group) > 1]:
        pairs = "; ".join(_quoted(group) for group in alike[:3])
        yield f"labels that differ in capitals, spaces or accents' spelling alone are classes of their own: {pairs}"


def _quoted(labels: Sequence[str]) -> str:
    return ", ".join(repr(label) for label in labels)


def _essence(label: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())
