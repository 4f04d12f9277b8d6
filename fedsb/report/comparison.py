"""``comparison.md`` of several runs or of a sweep, with ``comparison.csv`` and a table of means over seeds."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsb.core.folders import filled_whole
from fedsb.report.clients import by_clients, measured_where
from fedsb.report.labels import flatten, run_labels, varying
from fedsb.report.markdown import document, or_dash, table, write
from fedsb.report.plots import compare
from fedsb.report.series import final_metrics, largest_gap, metric_names, total_or_none, totals
from fedsb.report.table import bound, epsilon_text, gap_text, human_bytes, human_seconds, number, plural
from fedsb.run.folder import Run, read_run

PAYLOADS = ("payload_up", "payload_down", "payload_one_off", "payload_total")


def write_comparison(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write ``comparison.md``, ``.csv`` and ``.png`` into ``out``, or into the first run's parent folder.

    Raises:
        UserError: one of the folders holds no run.
    """
    runs = [read_run(folder) for folder in folders]
    where = runs[0].path.parent if out is None else Path(out)
    with filled_whole(where) as scratch:
        plot = compare(folders, scratch / "comparison.png")
        write_csv(runs, scratch / "comparison.csv")
        written = write(scratch / "comparison.md", _text(runs, plot))
    return where / written.name


def _text(runs: Sequence[Run], plot: Path) -> str:
    sections = {"Results": "\n\n".join(filter(None, [_results(runs), _told_apart(runs), f"![The runs side by side]({plot.name})"]))}
    if seeds := _over_seeds(runs):
        sections["Over seeds"] = seeds
    sections["Settings that differ"] = _differences(runs)
    lead = f"{plural(len(runs), 'run')}; bytes are summed over clients and rounds. The same figures are in `comparison.csv`."
    return document("Comparison of runs", lead, sections)


def _told_apart(runs: Sequence[Run]) -> str:
    """Say whose metrics are measured on other examples than the rest; empty where all are measured alike."""
    apart = dict.fromkeys(run.method for run in runs if by_clients(run))
    if not apart or all(run.method in apart for run in runs):
        return ""
    return (
        f"Not to be held against the others: {', '.join(apart)} is measured by its clients, each on the part that it holds out, with "
        "factors of its own, and the rest by the server on the test part."
    )


def write_csv(runs: Sequence[Run], path: Path) -> Path:
    """Write a row a run: what varies, every metric, bytes, gap, epsilon, seconds, folder."""
    keys, metrics = varying(runs), list(dict.fromkeys(name for run in runs for name in metric_names(run.records)))
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["method", *keys, "finished", "rounds", *metrics, *PAYLOADS, "exactness_gap", "epsilon", "wall_s", "measured_on", "folder"]
        )
        rows.writerows(_csv_row(run, keys, metrics) for run in runs)
    return path


def _csv_row(run: Run, keys: Sequence[str], metrics: Sequence[str]) -> list[object]:
    final, sums, epsilon = final_metrics(run.records), totals(run.records), (run.summary or {}).get("epsilon") or {}
    return [
        run.method, *(run.setting(key) for key in keys), run.summary is not None, run.records[-1].round,
        *(final.get(name) for name in metrics), *(sums[key] for key in PAYLOADS), largest_gap(run.records), epsilon.get("max"),
        total_or_none([record.wall_s for record in run.records]), measured_where(run), run.path,
    ]  # fmt: skip


def _results(runs: Sequence[Run]) -> str:
    metrics = list(dict.fromkeys(name for run in runs for name in metric_names(run.records)))
    head = ["run", "rounds", *metrics, "up", "down", "one-off", "total", "trained", "gap", "epsilon", "time", "folder"]
    return table(head, [_result(run, label, metrics) for run, label in zip(runs, run_labels(runs), strict=True)])


def _result(run: Run, label: str, metrics: Sequence[str]) -> list[object]:
    summary, final, sums = run.summary or {}, final_metrics(run.records), totals(run.records)
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


def _over_seeds(runs: Sequence[Run]) -> str:
    """Return the table of means over seeds; empty where no two finished runs differ in their seed alone."""
    groups: dict[str, dict[object, Run]] = {}
    for run, label in zip(runs, run_labels(runs, without=("seed",)), strict=True):
        if run.summary is not None:
            # Two runs of one seed are one measurement: counted twice they would narrow the error.
            groups.setdefault(label, {})[run.setting("seed")] = run
    if all(len(group) < 2 for group in groups.values()):
        return ""
    metrics = list(dict.fromkeys(name for run in runs for name in metric_names(run.records)))
    body = [_mean_row(label, list(group.values()), metrics) for label, group in groups.items()]
    return table(["runs", "seeds", *metrics, "total", "epsilon"], body) + "\n\nMean ± standard error over the seeds."


def _mean_row(label: str, group: Sequence[Run], metrics: Sequence[str]) -> list[object]:
    final = [final_metrics(run.records) for run in group]
    epsilons = [found["max"] for run in group if (found := (run.summary or {}).get("epsilon"))]
    return [
        label,
        len(group),
        *(mean_text([row[name] for row in final if name in row]) for name in metrics),
        human_bytes(statistics.fmean(totals(run.records)["payload_total"] for run in group)),
        bound(max(epsilons)) if epsilons and None not in epsilons else "–",
    ]


def mean_text(values: Sequence[float]) -> str:
    """Write a mean with its standard error, the sample's standard deviation over √n; no error is known of a single value."""
    if not values or any(map(math.isnan, values)):
        return "–"
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.fmean(values))} ± {number(statistics.stdev(values) / math.sqrt(len(values)))}"


def _differences(runs: Sequence[Run]) -> str:
    flat: list[Mapping[str, str]] = [dict(flatten(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for row in flat for key in row) if len({row.get(key, "–") for row in flat}) > 1]
    if not keys:
        return "None."
    return table(("setting", *run_labels(runs)), [(f"`{key}`", *(row.get(key, "–") for row in flat)) for key in keys])
