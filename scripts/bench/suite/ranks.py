"""The rank at which a contestant has the reference's budget: foretold to the byte, before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedsb.app.assembly import peopled
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.cost.foretell import Cost
from fedsb.cost.table import cost_of

from .contestants import BYTES, CONTESTANTS, REFERENCE, REFERENCE_RANK, VALUES, Contestant

MOST = 384  # MiniLM's smallest side
SPENT: dict[str, Callable[[Cost], int]] = {VALUES: lambda cost: cost.trained, BYTES: lambda cost: cost.payload}


def spent(budget: str, overrides: Sequence[str]) -> int:
    """Return what a run spends of a budget: values that a client trains, or bytes of all clients, one-off included."""
    return SPENT[budget](cost_of(peopled(load(overrides))))


@dataclass(frozen=True)
class Found:
    """The rank of a contestant, None where it has none to choose, and what it spends of a budget beside the reference, less 1."""

    rank: int | None
    off: float


def rank_at(budget: str, contestant: Contestant, shared: Sequence[str]) -> Found:
    """Return the rank with which a contestant comes nearest to the reference at its rank."""
    wanted = spent(budget, [*CONTESTANTS[REFERENCE].overrides, *shared, f"rank={REFERENCE_RANK}"])
    given = [*contestant.overrides, *contestant.at.get(budget, ()), *shared]
    if not contestant.sized:
        return Found(None, spent(budget, given) / wanted - 1)
    below, above = 1, MOST
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if _spent_or_more(budget, given, middle) <= wanted else (below, middle)
    rank = min((below, above), key=lambda rank: abs(_spent_or_more(budget, given, rank) - wanted))
    return Found(rank, _spent_or_more(budget, given, rank) / wanted - 1)


def _spent_or_more(budget: str, overrides: Sequence[str], rank: int) -> float:
    try:
        return spent(budget, [*overrides, f"rank={rank}"])
    except UserError:  # a rank that the model or the family does not bear
        return float("inf")
