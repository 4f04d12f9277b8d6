"""How a run or a sweep stands, from its records alone: nothing is locked, and nothing of it is written."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedsb.core.errors import UserError
from fedsb.report.series import metrics_of, primary_metric, total_or_none, totals
from fedsb.report.table import bound, gap_text, human_bytes, human_seconds, metric_text
from fedsb.run.folder import Loader, records_in, summary_of
from fedsb.run.records import RoundRecord
from fedsb.sweep.manifest import DONE, FAILED, INTERRUPTED, MANIFEST, RUNNING, WAITING

BEGUN = "begun"  # of a run outside of a sweep, of which nobody tells whether its process is there
UNREADABLE = "unreadable"
ORDER = (RUNNING, BEGUN, FAILED, INTERRUPTED, UNREADABLE, DONE, WAITING)
OVER = (DONE, FAILED, INTERRUPTED, UNREADABLE)
HEAD = ("run", "state", "round", "result", "gap", "epsilon", "bytes", "time", "last record")


@dataclass(frozen=True)
class Seen:
    """How a run stands.

    Attributes:
        label: what it is called.
        state: as the sweep's manifest has it, or what its folder shows.
        rounds: that it is to have; None where nobody tells yet.
        records: of its rounds.
        age_s: seconds since its last record; None before the first.
        why: reason of a failure.
        summary: of one that has finished.
    """

    label: str
    state: str
    rounds: int | None = None
    records: tuple[RoundRecord, ...] = ()
    age_s: float | None = None
    why: str = ""
    summary: Mapping[str, Any] | None = None

    @property
    def done(self) -> int:
        """The last round that there is a record of."""
        return self.records[-1].round if self.records else 0

    @property
    def took_s(self) -> float | None:
        """Seconds of its rounds so far; None where they do not tell."""
        return total_or_none([record.wall_s for record in self.records])

    @property
    def left_s(self) -> float | None:
        """Seconds that are left of it by its rounds so far; None before the first, or where they do not tell."""
        if self.state == DONE or self.rounds is None or not self.done or self.took_s is None:
            return None
        return self.took_s / self.done * max(0, self.rounds - self.done)


class Watch:
    """Looks at a folder again and again, and reads what has changed.

    Args:
        folder: of a run, of a sweep, or of several runs.

    Raises:
        UserError: it holds none of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[Path, tuple[tuple[int, int], Any]] = {}
        if not (folder / MANIFEST).is_file() and not self.runs():
            raise UserError(f"'{folder}' holds neither a run nor a sweep; give the folder of one that has begun")

    @property
    def is_run(self) -> bool:
        """Whether the folder is that of one run."""
        return _has_begun(self.folder)

    def runs(self) -> list[Path]:
        """Return the folders of runs that have begun."""
        if self.is_run:
            return [self.folder]
        return sorted(path for path in self.folder.glob("*") if _has_begun(path) and ".damaged-" not in path.name)

    def look(self) -> list[Seen]:
        """Return how each run stands now, those of a sweep in the order of its jobs.

        Raises:
            UserError: the manifest of the sweep can't be read, or the folder is gone.
        """
        if not self.folder.is_dir():
            raise UserError(f"'{self.folder}' is gone")
        if not (self.folder / MANIFEST).is_file():
            return [self._run(path, path.name, {}) for path in self.runs()]
        return [self._run(self.folder / job["name"], job["label"], job) for job in self._jobs()]

    def _jobs(self) -> list[Mapping[str, Any]]:
        path = self.folder / MANIFEST
        try:
            return [{**job, "name": job["name"], "label": job["label"]} for job in self._read(path, json.loads)["jobs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{path}' can't be read ({' '.join(str(error).split())[:80]}); restore it") from None

    def _run(self, path: Path, label: str, told: Mapping[str, Any]) -> Seen:
        metrics = path / "metrics.jsonl"
        why = str(told.get("reason") or "")
        try:
            records = self._read(metrics, lambda _: records_in(metrics)) or ()
            config = self._read(path / "config.yaml", lambda text: yaml.load(text, Loader)) or {}
            rounds = config.get("federation", {}).get("num_rounds")
            summary = self._read(path / "summary.json", summary_of)
            age = time.time() - metrics.stat().st_mtime if metrics.is_file() else None
        except FileNotFoundError:  # taken away between two looks
            return Seen(label, told.get("state", WAITING))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            return Seen(label, UNREADABLE, why=" ".join(str(error).split())[:80])
        state = DONE if summary is not None else told.get("state", BEGUN)
        return Seen(label, state, rounds, records, age, "" if state == DONE else why, summary)

    def _read(self, path: Path, read: Any) -> Any:
        """Return what is read of a file, which is read again where it has changed; None where it is not there."""
        try:
            status = path.stat()
            mark = (status.st_mtime_ns, status.st_size)
            if self._kept.get(path, (None, None))[0] != mark:
                self._kept[path] = (mark, read(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        return self._kept[path][1]


def _has_begun(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file()


def is_over(seen: Sequence[Seen]) -> bool:
    """Tell whether nothing more is to come: all has finished, or failed."""
    return all(each.state in OVER for each in seen)


def counts_text(seen: Sequence[Seen]) -> str:
    """Return how many runs are in which state, and when all is over."""
    count = Counter(each.state for each in seen)
    told = ", ".join(f"{count[state]} {state}" for state in ORDER if count[state])
    left = left_s(seen)
    return f"{told}; all in {human_seconds(left)}" if left else told


def left_s(seen: Sequence[Seen]) -> float | None:
    """Return the seconds until all is over, by the mean of what has finished or runs; None where nothing tells."""
    now = [each for each in seen if each.state in (RUNNING, BEGUN)]
    waiting = sum(each.state == WAITING for each in seen)
    known = [left for each in now if (left := each.left_s) is not None]
    whole = [took for each in seen if each.state == DONE and (took := each.took_s) is not None]
    whole = whole or [each.left_s + (each.took_s or 0.0) for each in now if each.left_s is not None]
    if not now or (not known and not whole) or (waiting and not whole):
        return None
    mean = sum(whole) / len(whole) if whole else 0.0
    unknown = sum(max(0.0, mean - (each.took_s or 0.0)) for each in now if each.left_s is None)
    return (sum(known) + unknown + waiting * mean) / len(now)


def board(folder: Path, seen: Sequence[Seen], most: int | None = None) -> Group:
    """Return what a terminal shows: a row a run, those under way first.

    Args:
        folder: that is looked at.
        seen: how its runs stand.
        most: rows that there is room for; None shows all.
    """
    ordered = sorted(seen, key=lambda each: ORDER.index(each.state) if each.state in ORDER else len(ORDER))
    shown = ordered if most is None or len(ordered) <= most else ordered[: max(1, most - 1)]
    table = Table(*HEAD, box=None, header_style="dim")
    for each in shown:
        table.add_row(*map(Text, cells(each)))
    rest = Counter(each.state for each in ordered[len(shown) :])
    more = [Text("and " + ", ".join(f"{count} {state}" for state, count in rest.items()) + " more", style="dim")] if rest else []
    return Group(Text(str(folder), style="bold"), table, *more, Text(counts_text(seen)))


def cells(seen: Seen) -> tuple[str, ...]:
    """Return a row of the board as text."""
    final, metric = metrics_of(seen.records, seen.summary), primary_metric(seen.records)
    gaps = [record.exactness_gap for record in seen.records if record.exactness_gap is not None]
    epsilon = next((record.epsilon for record in reversed(seen.records) if record.epsilon is not None), None)
    return (
        seen.label,
        seen.state,
        f"{seen.done}/{seen.rounds if seen.rounds is not None else '?'}" if seen.records else "–",
        seen.why or (f"{metric} {metric_text(metric, final[metric])}" if metric in final and metric else "–"),
        gap_text(gaps[-1]) if gaps else "–",
        "–" if epsilon is None else bound(epsilon["max"]),
        human_bytes(totals(seen.records)["payload_total"]) if seen.records else "–",
        human_seconds(seen.took_s) if seen.records else "–",
        f"{human_seconds(seen.age_s)} ago" if seen.age_s is not None and seen.state not in OVER else "–",
    )
