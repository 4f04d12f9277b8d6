"""What the tables of language models say of the runs of a contestant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from fedsb.report.intervals import wilson
from fedsb.report.table import human_bytes
from fedsb.run.folder import Run

Cell = Mapping[str, Any]


def cell_of(run: Run) -> Cell:
    """Return what is kept of a run: its first and last measures, bytes, gap and CPU seconds."""
    first, last, end = run.records[0].metrics, run.records[-1].metrics, run.summary or {}
    keys = [key for key in ("loss", "exact_match", "parse_failures", "chance", "examples") if key in first]
    return {
        "untouched": {key: first[key] for key in keys},
        "trained": {key: last[key] for key in keys},
        "bytes": end["payload_total"],
        "one_off": end["payload_one_off"],
        "gap": end["exactness_gap"],
        "cpu_s": end["cpu_s"],
    }


def row_of(contestant: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return what a table says of a contestant: a value a seed, in their order."""
    of_run = {key: [cell[key] for cell in cells] for key in ("bytes", "one_off", "gap", "cpu_s")}
    measured = {part: {key: [cell[part][key] for cell in cells] for key in cells[0][part]} for part in ("untouched", "trained")}
    return {"contestant": contestant, **measured, **of_run}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table, the smallest loss first."""
    scored = any("exact_match" in row["trained"] for row in rows)
    head = ["", "loss", "below untouched", *(["exact match", "no answer"] if scored else []), "bytes", "one-off", "gap", "CPU min"]
    lines = [list(untouched(rows, scored))] if rows else []
    lines += [list(written(row, scored)) for row in sorted(rows, key=lambda row: mean(row["trained"]["loss"]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def untouched(rows: Sequence[Mapping[str, Any]], scored: bool) -> Iterator[str]:
    """Yield the line of the base before any round, of the contestant that has the most seeds."""
    row = max(rows, key=lambda row: len(row["bytes"]))
    yield from ("untouched base", several(row["untouched"]["loss"]), "")
    if scored:
        yield from (share(row["untouched"], "exact_match"), share(row["untouched"], "parse_failures"))
    yield from ("0", "0", "", "")


def written(row: Mapping[str, Any], scored: bool) -> Iterator[str]:
    """Yield a contestant's line."""
    yield from (row["contestant"], several(row["trained"]["loss"]), several(gains_of(row)))
    if scored:
        yield from (share(row["trained"], "exact_match"), share(row["trained"], "parse_failures"))
    yield human_bytes(round(mean(row["bytes"])))
    yield human_bytes(round(mean(row["one_off"])))
    yield f"{max(row['gap']):.1e}" if None not in row["gap"] else "-"
    yield f"{mean(row['cpu_s']) / 60:.0f}"


def several(values: Sequence[float]) -> str:
    """Write the mean of the seeds, and each of them."""
    return f"{mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def share(metrics: Mapping[str, Sequence[float]], key: str) -> str:
    """Write a share, the mean of the seeds, with Wilson's interval at 95% of one seed's questions: all seeds are asked the same."""
    found = mean(metrics[key])
    low, high = wilson(found, int(min(metrics["examples"])))
    return f"{found:.3f} [{low:.3f}, {high:.3f}]"


def gains_of(row: Mapping[str, Any]) -> list[float]:
    """Return by how much the loss fell, a value a seed."""
    return [before - after for before, after in zip(row["untouched"]["loss"], row["trained"]["loss"], strict=True)]
