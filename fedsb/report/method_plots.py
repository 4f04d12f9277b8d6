"""Plots of methods over their seeds: paired differences with their intervals, and quality against bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsb.report.drawing import COLOURS, MARKERS, STYLES, canvas, dress, save
from fedsb.report.groups import Group
from fedsb.report.pairing import Compared
from fedsb.report.resampling import Difference
from fedsb.report.series import LOWER_IS_BETTER
from fedsb.report.table import human_bytes
from fedsb.report.until import Point, mean_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLEAR, UNCLEAR = COLOURS[0], "#888888"
CROWD = 12  # curves that one can tell apart; of more, colours are for those that are ahead somewhere
FAR = 3.0  # times the reach of three quarters of the differences, from which on one is drawn at the edge, with its value


def draw_differences(path: Path, rows: Sequence[Compared], metric: str) -> Path | None:
    """Draw each difference with its interval, the largest on top; filled where it stands out. None where there are none.

    Where a few are so far out that the others would be dots on a line, these stand at the edge with their value.
    """
    shown = [(row, row.difference) for row in rows if row.difference is not None and not math.isnan(row.difference.value)]
    if not shown:
        return None
    shown.sort(key=lambda pair: pair[1].value, reverse=metric not in LOWER_IS_BETTER)
    figure = canvas(7.6, 1.3 + 0.32 * len(shown))
    ax = figure.subplots()
    limit = _reach([found for _, found in shown])
    for place, (_, found) in enumerate(shown):
        _draw_difference(ax, place, found, limit)
    ax.axvline(0, color="#000000", linewidth=0.8, zorder=1)
    references = dict.fromkeys(row.reference.label for row, _ in shown if row.reference)
    against = next(iter(references)) if len(references) == 1 else "its reference"
    better = "left" if metric in LOWER_IS_BETTER else "right"
    dress(ax, f"{metric}: difference from {against}", f"paired by seed and test item, interval at 95%; {better} of 0 is better", "")
    ax.set_yticks(range(len(shown)), [row.group.label for row, _ in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.grid(False, axis="y")
    return save(figure, path)


def _reach(found: Sequence[Difference]) -> float:
    """Return how far from zero the axis goes."""
    ends = sorted(max(map(abs, each.interval)) for each in found)
    return min(ends[-1], FAR * ends[3 * (len(ends) - 1) // 4]) or ends[-1]


def _draw_difference(ax: Axes, place: int, found: Difference, limit: float) -> None:
    colour = CLEAR if found.stands_out else UNCLEAR
    low, high = (max(-limit, min(limit, end)) for end in found.interval)
    ax.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
    for end in found.interval:
        if abs(end) > limit:
            ax.plot([math.copysign(limit, end)], [place], marker="<" if end < 0 else ">", color=colour)
    if abs(found.value) <= limit:
        ax.plot([found.value], [place], marker="o", color=colour, markerfacecolor=colour if found.stands_out else "white")
        return
    side = math.copysign(1.0, found.value)
    inner, text = high if side < 0 else low, f"   {found.value:+.3f}   "
    ax.text(inner, place, text, color=colour, fontsize=8, va="center", ha="left" if side < 0 else "right")


def draw_until(path: Path, groups: Sequence[Group], metric: str, target: float | None, named: Collection[str] = ()) -> Path | None:
    """Draw each method's mean over seeds against the bytes so far, those of the start included; a level where nobody federates.

    Of more than 12 curves those alone have colours that are somewhere ahead of all others, at fewer bytes or by a better value, and
    those whose labels are in ``named``.
    """
    curves = {group.label: mean_curve(list(group.runs.values()), metric) for group in groups if not group.by_clients}
    moving = {group.label: [p for p in curves[group.label] if p.bytes > 0] for group in groups if group.moves and group.label in curves}
    still = {label: curve[-1].value for label, curve in curves.items() if curve and label not in moving}
    if not any(moving.values()):
        return None
    figure = canvas(8.4, 4.8)
    ax = figure.subplots()
    ax.set_xscale("log")
    moving = {label: curve for label, curve in moving.items() if curve}
    told = {*moving} if len(moving) <= CROWD else {*ahead(moving, metric), *named}
    _draw_others(ax, [curve for label, curve in moving.items() if label not in told])
    for place, (label, curve) in enumerate((label, curve) for label, curve in moving.items() if label in told):
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


def ahead(curves: Mapping[str, Sequence[Point]], metric: str) -> list[str]:
    """Return whose curve has a point that no other point matches at as many bytes or fewer, by least bytes first."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    best = -math.inf
    found: list[str] = []
    points = sorted((p.bytes, -sign * p.value, label) for label, curve in curves.items() for p in curve if not math.isnan(p.value))
    for _, worse, label in points:
        if -worse > best:
            best = -worse
            found.append(label)
    return list(dict.fromkeys(found))


def _draw_others(ax: Axes, curves: Sequence[Sequence[Point]]) -> None:
    label = f"{len(curves)} others, nowhere ahead"
    for place, curve in enumerate(curves):
        name = "_nolegend_" if place else label
        ax.plot([p.bytes for p in curve], [p.value for p in curve], ".-", label=name, color="#C4C4C4", linewidth=1, markersize=4, zorder=1)


def _bytes_labels(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    low, high = ax.get_xlim()
    if high / low < 100:
        from matplotlib.ticker import LogLocator

        ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value).replace(".0 ", " ")))
    ax.xaxis.set_minor_formatter(NullFormatter())
