"""What is said before the first round: of the classes, the texts, the model and the runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedsb.app.assembly import cut_texts
from fedsb.config.schema import Config
from fedsb.models.pooling import pooling_remark
from fedsb.report.classes import class_lines
from fedsb.runtime.grid import SimulationGrid
from fedsb.runtime.stack_size import ranks_remark, stack_remark


def opening_remarks(
    config: Config, grid: Any, labels: Sequence[str], told: Sequence[str] = (), *, counts: Mapping[str, int]
) -> Iterator[str]:
    """Yield the lines that a run opens with.

    Args:
        config: of the run.
        grid: that the run goes over.
        labels: names of the classes, in order.
        told: further lines.
        counts: training examples by client.
    """
    stacks = (stack_remark(config, grid), ranks_remark(config, grid, counts))
    runtime = (*stacks, grid.remark if isinstance(grid, SimulationGrid) else "")
    lines = (*class_lines(labels), cut_texts(config), pooling_remark(config.model.pooling, "this run"), *runtime, *told)
    yield from filter(None, lines)
