"""What the benchmark scripts share: a figure with its bound, its line in the table, and the peak of allocations."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile

MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        what: its name in the table.
        value: what was measured.
        bound: what it is held against; None where it is for information.
        at_least: whether the bound is a lower one.
    """

    what: str
    value: float
    bound: float | None = None
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the bound is kept; without one it is."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def verdict(self) -> str:
        """PASS or FAIL; nothing without a bound."""
        return "" if self.bound is None else "PASS" if self.holds else "FAIL"

    def as_json(self) -> dict[str, Any]:
        """Return the figure as a row of JSON."""
        return {**asdict(self), "verdict": self.verdict}


def show(figure: Figure) -> Figure:
    """Print a figure beside its bound and hand it on."""
    value = f"{figure.value:10.2e}" if 0 < abs(figure.value) < 1e-3 else f"{figure.value:10.4f}"
    sign = ">=" if figure.at_least else "<="
    bound = "" if figure.bound is None else f"{sign} {figure.bound:<9.6g} {figure.verdict}"
    print(f"{figure.what:<72} {value}  {bound}".rstrip(), flush=True)
    return figure


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of the running sum of all of torch's allocations in a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes: list[int] = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(changes))


def numpy_peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of what NumPy and Python allocate in a call; :func:`peak_bytes` does not see it."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
