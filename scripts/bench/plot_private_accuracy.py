"""Draw the tables of ``private_accuracy.py`` from its cache: accuracy by epsilon, a panel for each data set and pooling.

Run as ``python scripts/bench/plot_private_accuracy.py [--cache docs/private_accuracy.json] [--out docs/private_accuracy.png]``. It runs
nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from private_accuracy import METHODS, TABLES, Cache, Row, table_rows

from fedsb.report.drawing import COLOURS, DPI, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"bbc": "BBC News, 5 clients x 320", "sst2": "SST-2, 6 clients x 1,153"}
POOLINGS = {"own": "model's own pooling", "mean": "mean pooling"}


def main() -> int:
    """Read the cache and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("docs/private_accuracy.json"), metavar="PATH")
    parser.add_argument("--out", type=Path, default=Path("docs/private_accuracy.png"), metavar="PATH")
    options = parser.parse_args()
    asked = argparse.Namespace(methods=list(METHODS), poolings=list(POOLINGS), seeds=[0, 1, 2], tune_only=False)
    figure = Figure(figsize=(10.0, 3.6 * len(TABLES)), layout="constrained")
    axes = figure.subplots(len(TABLES), len(POOLINGS), sharey="row", squeeze=False)
    for line, (name, table) in zip(axes, TABLES.items(), strict=True):
        rows = list(table_rows(table, asked, Cache(options.cache, deadline=0.0)))
        for ax, pooling in zip(line, POOLINGS, strict=True):
            draw(ax, [row for row in rows if row.pooling == pooling], table.epsilons)
            ax.set_title(f"{TITLES[name]}, {POOLINGS[pooling]}, δ = {table.delta:g}", loc="left", fontsize=10)
        line[0].set_ylabel("accuracy on the test part")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(METHODS), frameon=False)
    figure.savefig(options.out, dpi=DPI, facecolor="white")
    print(options.out)
    return 0


def draw(ax: Axes, rows: Sequence[Row], epsilons: Sequence[float | None]) -> None:
    """Draw a line a method, with the standard error of its seeds; methods stand a little beside one another, or they would cover."""
    for number, row in enumerate(rows):
        found = [[value for value in row.accuracies[epsilon] if value == value] for epsilon in epsilons]
        places = [place + 0.05 * (number - len(rows) / 2) for place, values in enumerate(found) if values]
        means = [mean(values) for values in found if values]
        errors = [stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in found if values]
        ax.errorbar(places, means, errors, label=row.method, color=COLOURS[number], marker=MARKERS[number], capsize=3, linewidth=1.4)
    ax.set_xticks(range(len(epsilons)), ["none" if epsilon is None else f"{epsilon:g}" for epsilon in epsilons])
    ax.set_xlim(-0.4, len(epsilons) - 0.6)
    ax.set_xlabel("epsilon (example level)")
    ax.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
