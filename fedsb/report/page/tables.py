"""Tables of a page: HTML that can be read without its script, which sorts by the keys that cells carry."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from urllib.parse import quote

from fedsb.report.budgets import mean_bytes
from fedsb.report.groups import Group
from fedsb.report.labels import run_labels
from fedsb.report.markdown import or_dash
from fedsb.report.methods import difference_text, largest_epsilon, mean_text
from fedsb.report.page.view import View, ranges_text
from fedsb.report.pairing import Compared
from fedsb.report.series import largest_gap, metrics_of, total_or_none, totals
from fedsb.report.table import bound, gap_text, human_bytes, human_seconds
from fedsb.run.folder import Run

LONGEST = 24  # characters that no line is broken in
NUMBER, WORD = "number", "word"  # how a column is sorted
WHOLE = 8  # characters that stay on one line: a size, a gap


@dataclass(frozen=True)
class Cell:
    """A cell: its text, by what it is sorted (the text where that is None), and where it leads."""

    text: str
    key: float | str | None = None
    link: str = ""
    strong: bool = False


def html_table(caption: str, head: Mapping[str, str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table whose columns can be sorted; on a phone each row is a card, so that cells carry the names of their columns.

    Args:
        caption: what it shows.
        head: how each column is sorted, by its name.
        rows: of cells, a cell a column.
    """
    heads = "".join(f'<th scope="col" role="columnheader" data-sort="{kind}">{breakable(name)}</th>' for name, kind in head.items())
    body = "".join(f'<tr role="row">{"".join(map(_cell, row, head, range(len(head))))}</tr>' for row in rows)
    caption, heads = f"<caption>{escape(caption)}</caption>", f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
    return f'<table role="table" class="sortable">{caption}{heads}<tbody role="rowgroup">{body}</tbody></table>'


def _cell(cell: Cell, column: str, place: int) -> str:
    text = f"<strong>{breakable(cell.text)}</strong>" if cell.strong else breakable(cell.text)
    if cell.link:
        text = f'<a href="{escape(cell.link)}">{text}</a>'
    key = cell.text if cell.key is None else "" if isinstance(cell.key, float) and math.isnan(cell.key) else cell.key
    tag, kind = ('th scope="row"', "rowheader") if place == 0 else ("td", "cell")
    whole = ' class="whole"' if len(cell.text) <= WHOLE else ""
    return f'<{tag} role="{kind}"{whole} data-key="{escape(str(key))}" data-label="{escape(column)}">{text}</{tag.split()[0]}>'


def breakable(text: str) -> str:
    """Return text as HTML in which a word too long for a column, as a path is, may be broken."""
    return "<wbr>".join(map(escape, re.sub(rf"\S{{{LONGEST}}}(?=\S)", "\\g<0>\n", text).split("\n")))


def methods_table(view: View) -> str:
    """Return the table of groups: each metric's mean and standard error, the paired difference, bytes, epsilon, gap, time."""
    differences = {id(row.group): _difference(row) for row in view.comparison.rows}
    columns: dict[str, tuple[str, Callable[[Group], Cell]]] = {
        "method": (WORD, lambda group: Cell(group.label)),
        "runs": (NUMBER, lambda group: Cell(ranges_text(view.runs_of(group)), len(group.runs))),
        **{name: (NUMBER, partial(_mean, name)) for name in view.metrics},
    }
    if differences:
        columns[f"{view.metric}: difference"] = (NUMBER, lambda group: differences.get(id(group), Cell("–", math.nan)))
    columns |= FIGURES
    rows = [[make(group) for _, make in columns.values()] for group in view.groups]
    said = "Mean ± standard error over the seeds; bold where the interval of a difference leaves zero out over several of them."
    return html_table(said, {name: kind for name, (kind, _) in columns.items()}, rows)


def _mean(name: str, group: Group) -> Cell:
    return Cell(mean_text(group.finals(name)), group.mean(name))


def _difference(row: Compared) -> Cell:
    if row.group is row.reference:
        return Cell("(the reference)", 0.0)
    if row.difference is None:
        return Cell(f"not paired: {row.why}", math.nan)
    return Cell(difference_text(row.difference).strip("*"), row.difference.value, strong=row.difference.stands_out)


def _epsilon(group: Group) -> Cell:
    found = largest_epsilon(group)
    return Cell("–" if found is None else bound(found), math.nan if found is None else found)


def _gap(runs: Sequence[Run]) -> Cell:
    found = [gap for run in runs if (gap := largest_gap(run.records)) is not None]
    return Cell(gap_text(max(found)), max(found)) if found else Cell("–", math.nan)


def _time(runs: Sequence[Run]) -> Cell:
    walls = [total_or_none([record.wall_s for record in run.records]) for run in runs]
    told = [wall for wall in walls if wall is not None]
    mean = statistics.fmean(told) if len(told) == len(runs) else None
    return Cell(human_seconds(mean), math.nan if mean is None else mean)


def _bytes(count: float) -> Cell:
    return Cell(human_bytes(count), count)


FIGURES: Mapping[str, tuple[str, Callable[[Group], Cell]]] = {
    "total": (NUMBER, lambda group: _bytes(mean_bytes(group, "payload_total"))),
    "without the one-off": (NUMBER, lambda group: _bytes(mean_bytes(group, "payload_total_without_one_off"))),
    "epsilon": (NUMBER, _epsilon),
    "largest gap": (NUMBER, lambda group: _gap(list(group.runs.values()))),
    "time": (NUMBER, lambda group: _time(list(group.runs.values()))),
}


def runs_table(view: View, where: Path) -> str:
    """Return the table of runs, by the numbers that figures name them by; ``where`` is the folder of the page, which links lead from."""
    runs = list({run.path: run for run in view.comparison.runs}.values())
    head = {"run": NUMBER, "what": WORD, "rounds": NUMBER, **dict.fromkeys(view.metrics, NUMBER), "total": NUMBER, "gap": NUMBER}
    head |= {"time": NUMBER, "folder": WORD}
    rows = [_run(view, run, label, where) for run, label in zip(runs, run_labels(runs), strict=True)]
    return html_table("The runs, by the numbers that the figures above name them by.", head, rows)


def _run(view: View, run: Run, label: str, where: Path) -> list[Cell]:
    final, last = metrics_of(run.records, run.summary), run.records[-1].round
    planned = run.setting("federation.num_rounds")
    number = view.numbers[run.path]
    return [
        Cell(str(number), number),
        Cell(label),
        Cell(str(last) if run.summary is not None else f"{last} of {planned}, not finished", last),
        *(Cell(or_dash(final.get(name), name), final.get(name, math.nan)) for name in view.metrics),
        _bytes(totals(run.records)["payload_total"]),
        _gap([run]),
        _time([run]),
        Cell(run.path.name, link=_link(run.path, where)),
    ]


def _link(folder: Path, where: Path) -> str:
    shown = folder / "report.md" if (folder / "report.md").is_file() else folder
    return quote(os.path.relpath(shown.resolve(), where.resolve()))
