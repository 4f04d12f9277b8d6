"""Plots of one run and of several side by side, drawn from run folders alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsb.report.clients import by_clients, measured_where
from fedsb.report.drawing import COLOURS, MARKERS, STYLES, bytes_axis, canvas, drawable, dress, rounds_axis, save
from fedsb.report.labels import run_labels
from fedsb.report.privacy import draw_noise, has_noise_figures, mark_level
from fedsb.report.series import LOWER_IS_BETTER, PAYLOADS, UNDRAWN, cumulative, curve, metric_names, primary_metric, totals
from fedsb.report.table import human_bytes
from fedsb.run.folder import Run, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WAYS = {"payload_up": "up", "payload_down": "down", "payload_one_off": "one-off"}
EXACT = 1e-5
# A gap of zero has no place on a log axis; this is far below what float64 resolves.
SMALLEST_GAP = 1e-18


def plot_run(folder: str | Path, out: Path | None = None) -> list[Path]:
    """Draw the plots of a run into its folder, or into ``out``, and return them; one whose data the run lacks is left out.

    Raises:
        UserError: the folder holds no run.
    """
    run = read_run(folder)
    figures = {name: draw(run) for name, draw in PLOTS.items()}
    return [save(figure, (out or run.path) / f"{name}.png") for name, figure in figures.items() if figure is not None]


def compare(runs: Sequence[Run], path: str | Path) -> Path:
    """Draw several runs in one figure at ``path``: colour tells the method, marker and line style the run."""
    labels = run_labels(runs)
    panels: tuple[Callable[[Axes, list[Run], list[str]], None], ...] = (
        _compare_quality,
        _compare_efficiency,
        _compare_bytes,
        _compare_gaps,
    )
    figure = canvas(11.0, 8.2 + 0.25 * max(0, len(runs) - 3))
    axes = figure.subplots(2, 2).flatten()
    for panel, ax in zip(panels, axes, strict=True):
        panel(ax, list(runs), labels)
    lines, names = axes[0].get_legend_handles_labels()
    if lines:
        figure.legend(lines, names, loc="outside lower center", ncols=2 if max(map(len, names)) > 28 else 3, frameon=False)
    return save(figure, Path(path))


def _quality(run: Run) -> Figure | None:
    names = metric_names(run.records)
    scores = [name for name in names if name not in LOWER_IS_BETTER | UNDRAWN]
    panels = ([scores] if scores else []) + [[name] for name in names if name in LOWER_IS_BETTER]
    if not panels:
        return None
    figure = canvas(0.8 + 4.6 * len(panels), 3.8)
    rounds = [record.round for record in run.records]
    for ax, group in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, colour, marker in zip(group, COLOURS * len(group), MARKERS * len(group), strict=False):
            ax.plot(*curve(run.records, name, rounds), marker=marker, color=colour, label=name)
        if group == ["loss"]:
            losses = [math.nan if record.train_loss is None else record.train_loss for record in run.records]
            if not all(map(math.isnan, losses)):
                ax.plot(rounds, losses, marker="s", linestyle="--", color=COLOURS[1], label="training loss on clients")
        title = f"{'Quality' if group is scores else group[0]} on {measured_where(run)}"
        dress(ax, title, "round", "score" if group is scores else group[0])
        rounds_axis(ax)
        ax.legend(frameon=False)
    return figure


def _bytes(run: Run) -> Figure | None:
    series = {way: cumulative(run.records, key) for key, way in WAYS.items()}
    shown = {way: counts for way, counts in series.items() if counts[-1]}
    if not shown:
        return None
    figure = canvas(6.4, 3.8)
    ax = figure.subplots()
    rounds = [record.round for record in run.records]
    # Up and down are often equal: a wide line stays visible under the narrow one.
    first = 5.0 if series["up"] == series["down"] else 1.8
    for (way, counts), colour, marker, width in zip(shown.items(), COLOURS, MARKERS, (first, 1.8, 1.8), strict=False):
        label = f"{way}: {human_bytes(counts[-1])}"
        ax.plot(
            rounds, [count or math.nan for count in counts], marker=marker, markersize=5 + width, linewidth=width, color=colour, label=label
        )
    dress(ax, "Payload so far, summed over clients", "round", "bytes")
    rounds_axis(ax)
    bytes_axis(ax, "y", [count for counts in shown.values() for count in counts])
    if ax.get_yscale() == "linear":
        ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return figure


def _efficiency(run: Run) -> Figure | None:
    metric = primary_metric(run.records)
    if metric is None or not totals(run.records)["payload_total"]:
        return None
    figure = canvas(6.4, 3.8)
    ax = figure.subplots()
    kinds = {"with the one-off": PAYLOADS, "without the one-off": PAYLOADS[:2]}
    if not totals(run.records)["payload_one_off"]:
        kinds = {"up and down": PAYLOADS[:2]}
    series = {label: cumulative(run.records, *keys) for label, keys in kinds.items()}
    everything = [count for counts in series.values() for count in counts]
    for (label, counts), colour, marker in zip(series.items(), COLOURS, MARKERS, strict=False):
        ax.plot(*curve(run.records, metric, drawable(counts, everything)), marker=marker, color=colour, label=label)
    dress(ax, f"{metric} against bytes", "payload so far, summed over clients", metric)
    bytes_axis(ax, "x", everything)
    ax.legend(frameon=False)
    return figure


def _exactness(run: Run) -> Figure | None:
    if all(record.exactness_gap is None for record in run.records):
        return None
    figure = canvas(6.4, 3.8)
    ax = figure.subplots()
    _draw_gaps(ax, run, color=COLOURS[0], marker="o")
    _dress_gaps(ax, f"Exactness gap of {run.method}")
    return figure


def _noise(run: Run) -> Figure | None:
    if not has_noise_figures(run):
        return None
    figure = canvas(9.6, 3.8)
    draw_noise(figure.subplots(1, 2), run, COLOURS, dress)
    return figure


def _draw_gaps(ax: Axes, run: Run, **style: Any) -> None:
    pairs = [(record.round, max(record.exactness_gap, SMALLEST_GAP)) for record in run.records if record.exactness_gap is not None]
    if pairs:
        ax.plot(*zip(*pairs, strict=True), **style)


def _dress_gaps(ax: Axes, title: str = "Exactness gap") -> None:
    ax.set_yscale("log")
    mark_level(ax, EXACT, "exact below 1e-5")
    dress(ax, title, "round", "relative distance to the true mean")
    rounds_axis(ax)


def _style(runs: Sequence[Run], index: int) -> dict[str, Any]:
    methods = list(dict.fromkeys(run.method for run in runs))
    before = sum(run.method == runs[index].method for run in runs[:index])
    lap, colour = divmod(methods.index(runs[index].method), len(COLOURS))
    # Methods that share a colour share no marker: each has every so many of them.
    shape = before * math.ceil(len(methods) / len(COLOURS)) + lap
    return {"color": COLOURS[colour], "marker": MARKERS[shape % len(MARKERS)], "linestyle": STYLES[shape % len(STYLES)]}


def _shared_metric(runs: Sequence[Run]) -> str | None:
    return next((metric for run in runs if (metric := primary_metric(run.records)) is not None), None)


def _compare_quality(ax: Axes, runs: list[Run], labels: list[str]) -> None:
    metric = _shared_metric(runs) or "quality"
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        where = f" (on {measured_where(run)})" if by_clients(run) else ""
        ax.plot(*curve(run.records, metric, [record.round for record in run.records]), label=f"{label}{where}", **_style(runs, i))
    dress(ax, f"{metric} over rounds", "round", metric)
    rounds_axis(ax)


def _compare_efficiency(ax: Axes, runs: list[Run], labels: list[str]) -> None:
    metric = _shared_metric(runs) or "quality"
    series = [cumulative(run.records, *PAYLOADS) for run in runs]
    everything = [count for counts in series for count in counts]
    for i, (run, counts) in enumerate(zip(runs, series, strict=True)):
        ax.plot(*curve(run.records, metric, drawable(counts, everything)), **_style(runs, i))
    dress(ax, f"{metric} against bytes, one-off included", "payload so far, summed over clients", metric)
    bytes_axis(ax, "x", everything)


def _compare_bytes(ax: Axes, runs: list[Run], labels: list[str]) -> None:
    """Bars side by side and not stacked, since the axis may be logarithmic."""
    height = 0.8 / len(WAYS)
    sums = [totals(run.records) for run in runs]
    for j, (key, way) in enumerate(WAYS.items()):
        where = [i + (j - 1) * height for i in range(len(runs))]
        counts = [total[key] for total in sums]
        bars = ax.barh(where, [count or math.nan for count in counts], height * 0.9, color=("#444444", "#999999", "#CCCCCC")[j], label=way)
        ax.bar_label(bars, [human_bytes(count) if count else "" for count in counts], padding=2, fontsize=8)
    dress(ax, "Payload of the whole run", "summed over clients", "")
    bytes_axis(ax, "x", [total[key] for total in sums for key in WAYS])
    ax.set_yticks(range(len(runs)), labels)
    ax.invert_yaxis()
    ax.margins(x=0.18)
    ax.grid(False, axis="y")
    ax.legend(frameon=False, fontsize=8, ncols=len(WAYS), loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0)


def _compare_gaps(ax: Axes, runs: list[Run], labels: list[str]) -> None:
    for i, run in enumerate(runs):
        _draw_gaps(ax, run, **_style(runs, i))
    _dress_gaps(ax)


PLOTS: dict[str, Callable[[Run], Figure | None]] = {
    "quality": _quality,
    "bytes": _bytes,
    "quality_against_bytes": _efficiency,
    "exactness": _exactness,
    "noise": _noise,
}
