"""``comparison.md`` of several runs or of a sweep, with ``comparison.csv``, a page, and methods held against each other."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsb.core.errors import UserError
from fedsb.core.folders import filled_whole
from fedsb.report.budgets import budgets_text, clients_text
from fedsb.report.clients import measured_where, told_apart
from fedsb.report.comparing import Comparison, comparisons
from fedsb.report.datasets import apart_text, left_out_text
from fedsb.report.labels import flatten, run_labels, varying
from fedsb.report.markdown import document, or_dash, table, write
from fedsb.report.method_plots import draw_differences, draw_until
from fedsb.report.methods import Asked, differences_text, seeds_text, until_text
from fedsb.report.page.page import write_page
from fedsb.report.plots import compare
from fedsb.report.series import largest_gap, metric_names, metrics_of, total_or_none, totals
from fedsb.report.table import epsilon_text, gap_text, human_bytes, human_seconds, plural
from fedsb.run.folder import DamagedRunError, Run, read_run

log = logging.getLogger(__name__)
PAGE = "comparison.html"
MOST = 24  # runs that one figure and one table of settings can show side by side
PAYLOADS = ("payload_up", "payload_down", "payload_one_off", "payload_total")


def sound(folders: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Return the runs in folders, and a line for each whose folder is damaged.

    Raises:
        UserError: one of the folders holds no run, or all are damaged.
    """
    runs: list[Run] = []
    damaged: list[str] = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except DamagedRunError as error:
            damaged.append(str(error))
    if not runs:
        raise UserError("; ".join(damaged[:3]))
    return runs, damaged


def write_comparison(folders: Sequence[str | Path], out: str | Path | None = None, asked: Asked | None = None) -> Path:
    """Write ``comparison.md``, ``.csv``, ``.html`` and plots into ``out``, or into the first run's parent folder.

    A run whose folder is damaged is left out, and told of in a warning and in what is written.

    Raises:
        UserError: one of the folders holds no run, all are damaged, or no run is of what is asked for.
    """
    runs, damaged = sound(folders)
    for line in damaged:
        log.warning("%s: left out", line)
    where = runs[0].path.parent if out is None else Path(out)
    found = comparisons(runs, asked or Asked())
    with filled_whole(where) as scratch:
        write_csv(runs, {run.path: part.data for part in found for run in part.runs}, scratch / "comparison.csv")
        write_page(scratch / PAGE, found, where, left_out=damaged)
        written = write(scratch / "comparison.md", comparison_text(runs, found, scratch, left_out=damaged))
    return where / written.name


def comparison_text(runs: Sequence[Run], found: Sequence[Comparison], plots: Path | None = None, left_out: Sequence[str] = ()) -> str:
    """Return a comparison in Markdown, and draw its plots into a folder; without one there are none.

    Args:
        runs: all of them.
        found: what :func:`fedsb.report.comparing.comparisons` makes of them.
        plots: where plots go.
        left_out: a line for each run that could not be read.

    Raises:
        UserError: no run is of what is asked for.
    """
    several = len(found) > 1
    named = {f"{group.label}, {part.data}" if several else group.label: group.first for part in found for group in part.groups}
    sections = {
        "Results": "\n\n".join(filter(None, [_results(runs), told_apart(runs), *_side_by_side(found, plots)])),
        **{title: text for number, part in enumerate(found) for title, text in _of_part(part, plots, number, len(found)).items()},
        "Settings that differ": _differences(runs, named),
    }
    lead = f"{plural(len(runs), 'run')}; bytes are summed over clients and rounds. The same figures are in `comparison.csv`."
    lead = "\n\n".join(filter(None, [lead, apart_text({part.data: part.runs for part in found}), left_out_text(left_out)]))
    return document("Comparison of runs", lead, {title: text for title, text in sections.items() if text})


def _side_by_side(found: Sequence[Comparison], plots: Path | None) -> list[str]:
    """Draw the runs over each of the data, which nobody is to hold against those over others."""
    if plots is None:
        return []
    shown = {part.data: (plots / f"comparison{_plus(number)}.png", part.runs) for number, part in enumerate(found)}
    drawn = {data: compare(runs, path) for data, (path, runs) in shown.items() if len(runs) <= MOST}
    return [_image(path, "The runs side by side" + (f": {data}" if len(found) > 1 else "")) for data, path in drawn.items()]


def _plus(number: int) -> str:
    """Return what sets the files of one of several parts apart."""
    return f"-{number + 1}" if number else ""


def _of_part(part: Comparison, plots: Path | None, number: int, parts: int) -> dict[str, str]:
    """Return the sections of runs over the same data, named by these where there are others."""
    sections = {"Over seeds": seeds_text(part.groups), **_of_methods(part, plots, _plus(number))}
    return {f"{title}: {part.data}" if parts > 1 else title: text for title, text in sections.items()}


def _of_methods(part: Comparison, plots: Path | None, plus: str) -> dict[str, str]:
    """Return the sections that hold methods against each other; none where there is one alone, or nothing was measured."""
    groups, metric = part.groups, part.metric
    if metric is None or len(groups) < 2:
        return {}
    chosen = part.asked.target is None
    until = "" if part.target is None else until_text(groups, metric, part.target, chosen=chosen)
    forest = curves = ""
    if plots is not None:
        forest = _image(draw_differences(plots / f"differences{plus}.png", part.rows, metric), "Paired differences with their intervals")
        drawn = draw_until(plots / f"quality_against_bytes{plus}.png", groups, metric, part.target)
        curves = _image(drawn, "Quality against bytes, one-off included")
    return {
        "Differences": "\n\n".join(filter(None, [differences_text(part.rows, metric), forest])),
        "Read with care": "\n".join(f"- {line}" for line in part.remarks),
        "Bytes to equal quality": "\n\n".join(filter(None, [until, curves])),
        "Budgets": budgets_text(groups),
        "Clients": clients_text(groups, metric),
    }


def _image(plot: Path | None, said: str) -> str:
    return "" if plot is None else f"![{said}]({plot.name})"


def write_csv(runs: Sequence[Run], data: Mapping[Path, str], path: Path) -> Path:
    """Write a row a run: what varies, every metric, bytes, gap, epsilon, seconds, name of its data, folder."""
    keys, metrics = varying(runs), list(dict.fromkeys(name for run in runs for name in metric_names(run.records)))
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "method",
                *keys,
                "finished",
                "rounds",
                *metrics,
                *PAYLOADS,
                "exactness_gap",
                "epsilon",
                "wall_s",
                "measured_on",
                "data",
                "folder",
            ]
        )
        rows.writerows([*_csv_row(run, keys, metrics), data[run.path], run.path] for run in runs)
    return path


def _csv_row(run: Run, keys: Sequence[str], metrics: Sequence[str]) -> list[object]:
    final, sums, epsilon = metrics_of(run.records, run.summary), totals(run.records), (run.summary or {}).get("epsilon") or {}
    return [
        run.method, *(run.setting(key) for key in keys), run.summary is not None, run.records[-1].round,
        *(final.get(name) for name in metrics), *(sums[key] for key in PAYLOADS), largest_gap(run.records), epsilon.get("max"),
        total_or_none([record.wall_s for record in run.records]), measured_where(run),
    ]  # fmt: skip


def _results(runs: Sequence[Run]) -> str:
    metrics = list(dict.fromkeys(name for run in runs for name in metric_names(run.records)))
    head = ["run", "rounds", *metrics, "up", "down", "one-off", "total", "trained", "gap", "epsilon", "time", "folder"]
    return table(head, [_result(run, label, metrics) for run, label in zip(runs, run_labels(runs), strict=True)])


def _result(run: Run, label: str, metrics: Sequence[str]) -> list[object]:
    summary, final, sums = run.summary or {}, metrics_of(run.records, run.summary), totals(run.records)
    gap = largest_gap(run.records)
    return [
        label if run.summary else f"{label} (did not finish)",
        run.records[-1].round,
        *(or_dash(final.get(name), name) for name in metrics),
        *(human_bytes(sums[key]) for key in PAYLOADS),
        f"{summary['trained_params']:,}" if summary else "–",
        "–" if gap is None else gap_text(gap),
        epsilon_text(summary) if summary else "–",
        human_seconds(total_or_none([record.wall_s for record in run.records])),
        f"`{run.path}`",
    ]


def _differences(runs: Sequence[Run], groups: Mapping[str, Run]) -> str:
    """Return the table of settings, a column a run; of many runs a column a method, without what differs between its seeds."""
    shown = dict(zip(run_labels(runs), runs, strict=True))
    if len(runs) > MOST:
        shown = dict(groups)
    flat: list[Mapping[str, str]] = [dict(flatten(run.config)) for run in shown.values()]
    keys = [key for key in dict.fromkeys(key for row in flat for key in row) if len({row.get(key, "–") for row in flat}) > 1]
    if not keys:
        return "None."
    return table(("setting", *shown), [(f"`{key}`", *(row.get(key, "–") for row in flat)) for key in keys])
