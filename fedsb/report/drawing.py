"""What all plots have in common: palette, figures, axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsb.report.table import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers too; yellow is left out, it is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", ":", "-.")
# From this spread on, the smaller series can't be read on a linear axis.
LOG_SPREAD = 10.0
DPI = 150


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure, in inches."""
    # A bare Figure draws with Agg and, unlike pyplot's, belongs to nobody else.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure and return where it lies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path


def dress(ax: Axes, title: str, x: str, y: str) -> None:
    """Give axes their title, labels and grid."""
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def rounds_axis(ax: Axes) -> None:
    """Mark whole rounds alone."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def bytes_axis(ax: Axes, which: str, shown: Sequence[float]) -> None:
    """Label an axis in bytes, and make it logarithmic where the values spread so far that a linear one hides the small."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis = ax.xaxis if which == "x" else ax.yaxis
    spread = ratio(shown)
    if spread > LOG_SPREAD:
        (ax.set_xscale if which == "x" else ax.set_yscale)("log")
        axis.set_major_locator(LogLocator(base=10, subs=(1.0,) if spread > 100 else (1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value).replace(".0 ", " ")))


def ratio(shown: Sequence[float]) -> float:
    """Return the largest over the smallest of what is above zero; 1 where nothing is."""
    positive = [value for value in shown if value > 0]
    return max(positive) / min(positive) if positive else 1.0


def drawable(counts: Sequence[float], everything: Sequence[float]) -> list[float]:
    """Leave a zero out where the axis will be logarithmic: the line to it would run out of the figure."""
    return [count or math.nan for count in counts] if ratio(everything) > LOG_SPREAD else list(counts)
