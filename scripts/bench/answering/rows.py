"""What the tables of language models say of the runs of a contestant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from fedsb.report.intervals import wilson
from fedsb.report.table import gaps_text, human_bytes
from fedsb.run.folder import Run
from fedsb.run.predictions import read_predictions

Cell = Mapping[str, Any]


def cell_of(run: Run) -> Cell:
    """Return what is kept of a run: its first and last measures, bytes, gaps and CPU seconds, and exact match by task where it has several.

    Raises:
        ValueError: it lost replies.
    """
    if failed := [name for record in run.records for name in record.failed]:
        raise ValueError(f"'{run.path}' lost replies of {', '.join(failed)}: it is no cell")
    first, last, end = run.records[0].metrics, run.records[-1].metrics, run.summary or {}
    keys = [key for key in ("loss", "exact_match", "parse_failures", "chance", "examples") if key in first]
    return {
        "untouched": {key: first[key] for key in keys},
        "trained": {key: last[key] for key in keys},
        **({"by_task": found} if (found := by_task(run)) else {}),
        "bytes": end["payload_total"],
        "one_off": end["payload_one_off"],
        "gap": end["exactness_gap"],
        "held_gap": end["held_gap"],
        "cpu_s": end["cpu_s"],
    }


def by_task(run: Run) -> dict[str, float]:
    """Return the exact match on each task's rows, which lie task by task; nothing where that is not known, as of a drawn part of them."""
    found, tasks = read_predictions(run.path), run.setting("data.tasks") or []
    right = found.columns.get("exact_match") if found is not None else None
    if right is None or len(tasks) < 2 or len(right) != len(tasks) * run.setting("data.task_test_rows"):
        return {}
    return {task: float(part.mean()) for task, part in zip(tasks, np.split(right, len(tasks)), strict=True)}


def row_of(contestant: str, cells: Mapping[int, Cell]) -> dict[str, Any]:
    """Return what a table says of a contestant: a value a seed, in their order. Cells of earlier versions have no ``held_gap``."""
    found = list(cells.values())
    of_run = {key: [cell.get(key) for cell in found] for key in ("bytes", "one_off", "gap", "held_gap", "cpu_s")}
    measured = {part: {key: [cell[part][key] for cell in found] for key in found[0][part]} for part in ("untouched", "trained")}
    split = [cell.get("by_task", {}) for cell in found]
    tasks = {task: [each[task] for each in split] for task in split[0] if all(task in each for each in split)}
    return {"contestant": contestant, "seeds": list(cells), **measured, **of_run, "by_task": tasks}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table, the largest gain first."""
    return "\n".join("| " + " | ".join(line) + " |" for line in table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of the table, its head first."""
    scored, most = any("exact_match" in row["trained"] for row in rows), max((len(row["seeds"]) for row in rows), default=0)
    head = [
        "",
        "loss",
        "below untouched",
        *(["exact match", "no answer", "chance"] if scored else []),
        "bytes",
        "one-off",
        "gap",
        "CPU min",
    ]
    lines = [list(untouched(rows, scored))] if rows else []
    lines += [list(written(row, scored, most)) for row in sorted(rows, key=lambda row: -mean(gains_of(row)))]
    return [head, ["---"] * len(head), *lines]


def untouched(rows: Sequence[Mapping[str, Any]], scored: bool) -> Iterator[str]:
    """Yield the line of the base before any round, of the contestant that has the most seeds."""
    row = max(rows, key=lambda row: len(row["bytes"]))
    yield from ("untouched base", several(row["untouched"]["loss"]), "")
    if scored:
        yield from (share(row["untouched"], "exact_match"), share(row["untouched"], "parse_failures"), several(row["untouched"]["chance"]))
    yield from ("0", "0", "", "")


def written(row: Mapping[str, Any], scored: bool, most: int) -> Iterator[str]:
    """Yield a contestant's line; of one that has not as many seeds as others, which those are."""
    some = f"(seed {', '.join(map(str, row['seeds']))})" if len(row["seeds"]) < most else ""
    yield from (row["contestant"], several(row["trained"]["loss"], some), several(gains_of(row), some))
    if scored:
        of_tasks = "".join(f"; {task} {mean(values):.3f}" for task, values in row["by_task"].items())
        yield from (
            share(row["trained"], "exact_match") + of_tasks,
            share(row["trained"], "parse_failures"),
            several(row["trained"]["chance"]),
        )
    yield human_bytes(round(mean(row["bytes"])))
    yield human_bytes(round(mean(row["one_off"])))
    yield gaps(row)
    yield f"{mean(row['cpu_s']) / 60:.0f}"


def gaps(row: Mapping[str, Any]) -> str:
    """Write the largest gap of the seeds, and that of the weights that clients compute with where it is known and another."""
    known, held = [gap for gap in row["gap"] if gap is not None], [gap for gap in row["held_gap"] if gap is not None]
    return gaps_text(max(known) if len(known) == len(row["gap"]) else None, max(held, default=None))


def several(values: Sequence[float], some: str = "") -> str:
    """Write the mean of the seeds and each of them, where they differ, or ``some`` in their place."""
    each = [f"{value:.3f}" for value in values]
    beside = some or (f"({', '.join(each)})" if len({*each}) > 1 else "")
    return f"{mean(values):.3f} {beside}".rstrip()


def share(metrics: Mapping[str, Sequence[float]], key: str) -> str:
    """Write a share, the mean of the seeds, with Wilson's interval at 95% of one seed's questions: all seeds are asked the same."""
    found = mean(metrics[key])
    low, high = wilson(found, int(min(metrics["examples"])))
    return f"{found:.3f} [{low:.3f}, {high:.3f}]"


def gains_of(row: Mapping[str, Any]) -> list[float]:
    """Return by how much the loss fell, a value a seed."""
    return [before - after for before, after in zip(row["untouched"]["loss"], row["trained"]["loss"], strict=True)]
