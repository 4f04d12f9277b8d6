"""The contest as a picture: CPU seconds a round and memory, by contestant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from contest.heats import Contest


def draw(tables: Mapping[str, Contest], path: Path) -> None:
    """Write the plot; ours in colour."""
    figure, axes = plt.subplots(len(tables), 2, figsize=(11, 0.6 + 2.9 * len(tables)), squeeze=False, layout="constrained")
    for (cpu, memory), (shape, table) in zip(axes, tables.items(), strict=True):
        rows = list(table.rows())[::-1]
        names = [name for name, *_ in rows]
        colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
        for axis, values, digits, title in (
            (cpu, [median(rounds.cpu_s) for _, rounds, _ in rows], "%.1f", "CPU seconds a round (median)"),
            (memory, [look.pss_mb for *_, look in rows], "%.0f", "peak memory, PSS in MB"),
        ):
            bars = axis.barh(names, values, color=colours)
            axis.bar_label(bars, fmt=digits, padding=3)
            axis.margins(x=0.12)
            axis.set_title(f"{title}, {shape}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        memory.set_yticklabels([])
    figure.savefig(path, dpi=120)
    plt.close(figure)
