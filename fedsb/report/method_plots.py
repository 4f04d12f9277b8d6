"""Plots of methods over their seeds: paired differences with their intervals, and quality against bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsb.report.drawing import COLOURS, MARKERS, STYLES, canvas, dress, save
from fedsb.report.groups import Group
from fedsb.report.pairing import Compared
from fedsb.report.series import LOWER_IS_BETTER
from fedsb.report.table import human_bytes
from fedsb.report.until import mean_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLEAR, UNCLEAR = COLOURS[0], "#888888"


def draw_differences(path: Path, rows: Sequence[Compared], metric: str) -> Path | None:
    """Draw each difference with its interval, the largest on top; filled where it stands out. None where there are none."""
    shown = [(row, row.difference) for row in rows if row.difference is not None and not math.isnan(row.difference.value)]
    if not shown:
        return None
    shown.sort(key=lambda pair: pair[1].value, reverse=metric not in LOWER_IS_BETTER)
    figure = canvas(7.6, 1.3 + 0.32 * len(shown))
    ax = figure.subplots()
    for place, (_, found) in enumerate(shown):
        low, high = found.interval
        colour = CLEAR if found.stands_out else UNCLEAR
        ax.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
        ax.plot([found.value], [place], marker="o", color=colour, markerfacecolor=colour if found.stands_out else "white")
    ax.axvline(0, color="#000000", linewidth=0.8, zorder=1)
    references = dict.fromkeys(row.reference.label for row, _ in shown if row.reference)
    against = next(iter(references)) if len(references) == 1 else "its reference"
    better = "left" if metric in LOWER_IS_BETTER else "right"
    dress(ax, f"{metric}: difference from {against}", f"paired by seed and test item, interval at 95%; {better} of 0 is better", "")
    ax.set_yticks(range(len(shown)), [row.group.label for row, _ in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.grid(False, axis="y")
    return save(figure, path)


def draw_until(path: Path, groups: Sequence[Group], metric: str, target: float | None) -> Path | None:
    """Draw each method's mean over seeds against the bytes so far, those of the start included; a level where nobody federates."""
    curves = {group.label: mean_curve(list(group.runs.values()), metric) for group in groups if not group.by_clients}
    moving = {group.label: [p for p in curves[group.label] if p.bytes > 0] for group in groups if group.moves and group.label in curves}
    still = {label: curve[-1].value for label, curve in curves.items() if curve and label not in moving}
    if not any(moving.values()):
        return None
    figure = canvas(8.4, 4.4 + 0.16 * max(0, len(curves) - 8))
    ax = figure.subplots()
    ax.set_xscale("log")
    for place, (label, curve) in enumerate((label, curve) for label, curve in moving.items() if curve):
        lap, colour = divmod(place, len(COLOURS))
        shape: dict[str, Any] = {"marker": MARKERS[(place + lap) % len(MARKERS)], "linestyle": STYLES[lap % len(STYLES)]}
        ax.plot([p.bytes for p in curve], [p.value for p in curve], label=label, markersize=5, color=COLOURS[colour], **shape)
    for place, (label, level) in enumerate(still.items()):
        ax.axhline(level, color="#666666", linewidth=1, linestyle=STYLES[1 + place % 3], label=f"{label} (no federation)")
    if target is not None:
        ax.axhline(target, color="#BBBBBB", linewidth=4, zorder=0, label="target")
    dress(ax, f"{metric} against bytes, one-off included", "payload so far, summed over clients; mean over seeds", metric)
    _bytes_labels(ax)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return save(figure, path)


def _bytes_labels(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    low, high = ax.get_xlim()
    if high / low < 100:
        from matplotlib.ticker import LogLocator

        ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value).replace(".0 ", " ")))
    ax.xaxis.set_minor_formatter(NullFormatter())
