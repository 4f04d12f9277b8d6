"""The table of ``fedsb eval``: a model beside its untouched base, each figure with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from fedsb.core.rng import numpy_generator
from fedsb.report.intervals import Interval, bootstrap, wilson
from fedsb.report.series import BESIDE
from fedsb.report.table import MAX_WIDTH, metric_text, number
from fedsb.run.predictions import Column

# Shares of examples, of which Wilson's interval is known without drawing.
SHARES = frozenset({"accuracy", "accuracy_norm", "exact_match", "parse_failures"})


@dataclass(frozen=True)
class Sample:
    """What some metrics of a model are made of, an entry an example.

    Attributes:
        count: of the examples.
        metrics: of some of them, by their indices; those of equal samples of two models are of the same examples.
        items: what is kept of each of them, as :class:`fedsb.run.predictions.Predictions` has it.
    """

    count: int
    metrics: Callable[[NDArray[np.int64]], Mapping[str, float]]
    items: Mapping[str, Column] = field(default_factory=dict)

    def all(self) -> dict[str, float]:
        """Return the metrics of all examples."""
        return dict(self.metrics(np.arange(self.count)))


@dataclass(frozen=True)
class Figure:
    """A metric of a model, or of the difference of two: its value and, where it varies with the examples, its interval."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Row:
    """A metric of the table; without a base there is neither it nor a difference."""

    metric: str
    base: Figure | None
    model: Figure
    difference: Figure | None


def rows_of(model: Sequence[Sample], base: Sequence[Sample] | None, seed: int) -> list[Row]:
    """Return the rows of a table: intervals of shares by Wilson's formula, of all else by a bootstrap, of differences by a paired one.

    Args:
        model: its samples, in the order in which they are shown.
        base: the same of the base.
        seed: names the stream of the draws.
    """
    pairs: list[tuple[Sample, Sample | None]] = [(each, base[i] if base else None) for i, each in enumerate(model)]
    return [row for i, pair in enumerate(pairs) for row in _rows(*pair, numpy_generator(seed, "eval.bootstrap", i))]


def _rows(model: Sample, base: Sample | None, generator: np.random.Generator) -> list[Row]:
    def drawn(chosen: NDArray[np.int64]) -> dict[str, float]:
        new = model.metrics(chosen)
        old = base.metrics(chosen) if base else {}
        gained = {f"gain {name}": new[name] - old[name] for name in old}
        return {f"new {k}": v for k, v in new.items()} | {f"old {k}": v for k, v in old.items()} | gained

    found, here, there = bootstrap(drawn, model.count, generator), model.all(), base.all() if base else {}

    def figure(which: str, name: str, values: Mapping[str, float]) -> Figure | None:
        if name not in values:
            return None
        if name in BESIDE:
            return Figure(values[name])
        share = name in SHARES and which != "gain"
        return Figure(values[name], wilson(values[name], model.count) if share else found[f"{which} {name}"])

    gains = {name: here[name] - there[name] for name in there if name not in BESIDE}
    return [
        Row(name, figure("old", name, there), figure("new", name, here) or Figure(here[name]), figure("gain", name, gains)) for name in here
    ]


def print_evaluation(rows: Sequence[Row], names: tuple[str, str], console: Console | None = None) -> None:
    """Print the table.

    Args:
        rows: of the table.
        names: of the base and of the model.
        console: where to print.
    """
    out = console or Console()
    if not out.is_terminal:
        out = Console(file=out.file, width=MAX_WIDTH, no_color=True)
    based = any(row.base for row in rows)
    table = Table(box=box.ROUNDED if out.is_terminal else box.ASCII)
    for title in ("", *((names[0],) if based else ()), names[1], *(("difference",) if based else ())):
        table.add_column(title, no_wrap=not title)
    for row in rows:
        cells = [row.base, row.model, row.difference] if based else [row.model]
        table.add_row(row.metric, *(_text(row.metric, cell) for cell in cells))
    out.print(table, width=min(out.width, MAX_WIDTH))
    out.print("in brackets: intervals at 95% over the examples")
    out.file.flush()


def _text(metric: str, figure: Figure | None) -> str:
    if figure is None:
        return ""
    text = metric_text(metric, figure.value)
    return text if figure.interval is None else f"{text} \\[{number(figure.interval[0])}, {number(figure.interval[1])}]"
