"""The jobs that a command line and ``sweep.grid`` make: products of named values, joined on the keys that both have."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fedsb.config.drawn import drawn
from fedsb.config.overrides import readable, sweep_jobs
from fedsb.config.schema import SweepConfig
from fedsb.core.errors import UserError
from fedsb.sweep.jobs import Job, label_jobs

MOST = 10_000  # jobs


def resolved(overrides: Sequence[str], settings: SweepConfig) -> tuple[Job, ...]:
    """Return the jobs of a sweep.

    A list of ``sweep.grid`` makes points of its own, so that a key may take other values for one method than for another. Each point meets
    each of the command line's; two that give a key different values do not go together.

    Args:
        overrides: of the command line, but those of ``sweep`` itself.
        settings: those.

    Raises:
        UserError: an override cannot be read, values are neither named nor drawn, or the command line names one that the grid lacks.
    """
    given = _points(overrides, settings)
    if not settings.grid:
        return label_jobs([list(point.values()) for point in given])
    laid = [point for group in settings.grid for point in _points(group, settings)]
    pairs = [(mine, theirs) for mine, theirs in itertools.product(laid, given) if _agree(mine, theirs)]
    met = [theirs for _, theirs in pairs]
    if lone := next((point for point in given if point not in met), None):
        shared = [lone[key] for key in lone if any(key in point for point in laid)]
        raise UserError(f"the grid of the sweep has nothing for {' '.join(shared)}; leave that out, or add it to sweep.grid")
    return label_jobs([list({**mine, **theirs}.values()) for mine, theirs in pairs])


def _points(overrides: Sequence[str], settings: SweepConfig) -> list[dict[str, str]]:
    """Return the points of one product, each its overrides by key."""
    texts = [readable(text) for text in overrides]
    plain, rows = drawn(texts, settings.samples, settings.seed)
    points = [[*job, *row] for job in sweep_jobs(plain) for row in rows]
    if len(points) > MOST:
        raise UserError(
            f"the grid has {len(points):,} jobs, and a sweep {MOST:,} at most; leave values out, or draw points: sweep.samples=N"
        )
    return [{text.partition("=")[0]: text for text in point} for point in points]


def _agree(mine: dict[str, str], theirs: dict[str, str]) -> bool:
    return all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys())
