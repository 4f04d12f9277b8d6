"""docs/methods.md out of the runs that ``methods.py`` has kept: ``python scripts/bench/methods_page.py docs/methods.json docs/methods.md``.

Every figure and both plots of a table are those that ``fedsb report`` gives of the same runs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from suite.cells import Cell, unpack
from suite.contestants import CONTESTANTS, REFERENCE, SEEDS
from suite.page import HEADS, LEAD, TUNED
from suite.plan import Cache, chosen

from fedsb.report.budgets import budgets_text, clients_text
from fedsb.report.groups import Group, grouped
from fedsb.report.markdown import table
from fedsb.report.method_plots import draw_differences, draw_until
from fedsb.report.methods import differences_text, until_text
from fedsb.report.pairing import against_reference
from fedsb.report.sanity import Table, remarks
from fedsb.report.table import gap_text
from fedsb.report.until import usual_target
from fedsb.run.folder import Run, read_run

METRIC = "accuracy"


def main() -> None:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    cache = Cache(options.cache)
    parts = [section for data, budget in HEADS for section in sections(cache, data, budget, options.page)]
    options.page.write_text("\n\n".join([LEAD, *parts]) + "\n", encoding="utf-8")


def sections(cache: Cache, data: str, budget: str, page: Path) -> Iterator[str]:
    """Yield the parts of a table; none where no run of it is kept."""
    cells = {name: cells_of(cache, f"{data}/{budget}/{name}") for name in CONTESTANTS}
    held = {name: found for name, found in cells.items() if found}
    if REFERENCE not in held:
        return
    with tempfile.TemporaryDirectory() as scratch:
        groups = groups_of(held, Path(scratch))
        rows = against_reference(groups, METRIC, REFERENCE)
        target = usual_target(groups, METRIC)
        plots = [page.with_name(f"{page.stem}-{data}-{budget}-{what}.png") for what in ("differences", "bytes")]
        draw_differences(plots[0], rows, METRIC)
        draw_until(plots[1], groups, METRIC, target)
        yield f"## {HEADS[data, budget]}"
        yield f"{sum(map(len, held.values()))} of {planned(budget)} runs are in."
        yield differences_text(rows, METRIC)
        yield f"![differences]({plots[0].name})"
        yield "\n".join(f"- {line}" for line in remarks(Table(groups, METRIC, TUNED)))
        yield until_text(groups, METRIC, target, chosen=True) if target is not None else ""
        yield f"![accuracy against bytes]({plots[1].name})"
        yield budgets_text(groups)
        yield clients_text(groups, METRIC)
        yield chosen_text(cache, data, budget, held)


def cells_of(cache: Cache, key: str) -> list[Cell]:
    """Return the kept runs of a contestant, by seed; those that failed are told of by their absence."""
    found = [cache.cells.get(f"{key}/seed {seed}") for seed in SEEDS]
    return [cell for cell in found if cell is not None and "failed" not in cell]


def groups_of(held: dict[str, list[Cell]], folder: Path) -> Sequence[Group]:
    """Return contestants as groups of a comparison."""
    runs: list[Run] = []
    for name, found in held.items():
        for cell in found:
            unpack(cell, name, where := folder / str(len(runs)))
            runs.append(read_run(where))
    groups = grouped(runs)
    for group in groups:
        assert group.predictions is not None  # read while the folders are there
    return groups


def planned(budget: str) -> int:
    """Return how many runs a table is to have."""
    return len(SEEDS) * sum(budget in contestant.budgets for contestant in CONTESTANTS.values())


def chosen_text(cache: Cache, data: str, budget: str, held: dict[str, list[Cell]]) -> str:
    """Return the table of chosen rates, gaps, gauges and seconds."""
    body = []
    for name, found in held.items():
        rates, rate = CONTESTANTS[name].rates, chosen(cache.cells, f"{data}/{budget}/{name}", CONTESTANTS[name].rates)
        gaps = [gap for cell in found if (gap := cell["facts"]["exactness_gap"]) is not None]
        gauges = [cell["gauge"] for cell in found if cell["gauge"] is not None]
        edge = " (the grid's edge)" if rate is not None and rate in (rates[0], rates[-1]) else ""
        body.append(
            [
                name,
                "–" if rate is None else f"{rate:g}{edge}",
                gap_text(max(gaps)) if gaps else "–",
                f"{fmean(gauges):.3g}" if gauges else "–",
                f"{fmean(cell['cpu_s'] for cell in found):.0f}",
            ]
        )
    head = ["method", "rate chosen", "largest gap of any round", "‖B‖ / ‖A‖ at the end", "CPU s a run"]
    return table(head, body)


if __name__ == "__main__":
    main()
