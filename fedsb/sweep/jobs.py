"""The jobs of a sweep: their overrides, and what their folders are called: by what varies."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count

LONGEST = 120  # characters of a folder's name: with those above it a path must stay below what file systems allow
VALUE = 40  # characters that it shows of a value, which may be a path


@dataclass(frozen=True)
class Job:
    """One point of the grid.

    Attributes:
        number: its place in the sweep, from 0.
        overrides: that make its configuration.
        label: what varies, as it was written.
        name: of its folder.
    """

    number: int
    overrides: tuple[str, ...]
    label: str
    name: str


def label_jobs(jobs: Sequence[Sequence[str]]) -> tuple[Job, ...]:
    """Name each job, and its folder, by the overrides that are not the same in all."""
    given = [{text.partition("=")[0]: text for text in job} for job in jobs]
    varied = varying(given)
    short = _shortened(varied)
    names = _told_apart(["+".join(f"{short[key]}={_plain(row[key])}" for key in varied if key in row) or "job" for row in given])
    labels = [" ".join(row[key] for key in varied if key in row) or "the only job" for row in given]
    return tuple(Job(i, tuple(job), labels[i], names[i]) for i, job in enumerate(jobs))


def varying(given: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys whose values are not the same in all rows, or that some rows lack."""
    keys = dict.fromkeys(key for row in given for key in row)
    return [key for key in keys if len({row.get(key) for row in given}) > 1]


def _shortened(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each dotted key, or all of it where that is another one's too."""
    bare = {key: key.lstrip("+~") for key in keys}
    last = Counter(key.rpartition(".")[2] for key in bare.values())
    return {key: found if last[found := name.rpartition(".")[2]] == 1 else name for key, name in bare.items()}


def _plain(text: str) -> str:
    """Return a value as part of a file's name that needs quotes in no shell; of a long one its end, which tells paths apart."""
    value = text.partition("=")[2].strip("'\"[]{}() /")
    return re.sub(r"[^\w.@-]+", "-", value, flags=re.ASCII)[-VALUE:]


def _told_apart(names: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        cut = name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}+{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        found[next(free for free in chain([cut], (f"{cut}+{n}" for n in count(2))) if free not in found)] = None
    return list(found)
