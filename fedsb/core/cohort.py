"""Who takes part in which round: drawn over logical clients from the seed, never over the nodes that happen to be online."""

from __future__ import annotations

from collections.abc import Sequence

from fedsb.core.rng import numpy_generator


def cohort_size(num_clients: int, fraction: float) -> int:
    """Return how many clients a round draws: the nearest whole number, at least one."""
    return max(1, round(num_clients * fraction))


def draw_cohort(clients: Sequence[str], size: int, *, seed: int, round_number: int) -> tuple[str, ...]:
    """Return the sorted cohort of a round, drawn without replacement."""
    ordered = sorted(clients)
    chosen = numpy_generator(seed, "cohort", round_number).choice(len(ordered), size=size, replace=False)
    return tuple(ordered[i] for i in sorted(chosen))


def evaluated_rounds(every: int, num_rounds: int) -> frozenset[int]:
    """Return the rounds after which a run is evaluated: each ``every``-th from the start on, and the last."""
    return frozenset({*range(0, num_rounds, every), num_rounds})


def dispatch_order(cohort: Sequence[str], num_examples: dict[str, int]) -> tuple[str, ...]:
    """Return a cohort in the order in which it is sent and summed: most examples first, then by name."""
    return tuple(sorted(cohort, key=lambda client: (-num_examples.get(client, 0), client)))
