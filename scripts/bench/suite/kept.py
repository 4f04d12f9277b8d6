"""What is kept of a table, read back as groups of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsb.report.groups import Group, grouped
from fedsb.run.folder import Run, read_run

from .cells import Cell, unpack
from .contestants import AT_CLIENTS, BASELINES, CONTESTANTS, SEEDS, VALUES
from .plan import Cache

FAR = 0.1  # off the budget by more is said
EXACT = 1e-5  # largest gap of a round of a method that is exact, in float32


@dataclass(frozen=True)
class Kept:
    """The finished runs of a table.

    Attributes:
        key: its data and budget.
        cells: by contestant, of those that have any.
        off: what a contestant spends of the budget beside the reference, less 1.
    """

    key: str
    cells: Mapping[str, Sequence[Cell]]
    off: Mapping[str, float]

    @property
    def planned(self) -> int:
        """How many runs the table is to have; baselines beside equal bytes are those of the other table."""
        return len(SEEDS) * sum(self.key.split("/")[1] in each.budgets for each in CONTESTANTS.values())

    @property
    def own(self) -> int:
        """How many of them are in."""
        return sum(len(found) for name, found in self.cells.items() if self.key.split("/")[1] in CONTESTANTS[name].budgets)

    def gap(self, name: str) -> float | None:
        """Return the largest gap of any round; None where none is measured."""
        gaps = [gap for cell in self.cells[name] if (gap := cell["facts"]["exactness_gap"]) is not None]
        return max(gaps, default=None)

    @property
    def exact(self) -> list[str]:
        """The federated contestants that lost nothing of any round, by what was measured; each once."""
        once = [name for name in self.cells if name not in BASELINES and name not in AT_CLIENTS]
        return [name for name in once if (gap := self.gap(name)) is not None and gap < EXACT]

    @property
    def far(self) -> dict[str, float]:
        """Whom the grid of ranks leaves off the budget, by how much; baselines have none to keep to."""
        return {name: off for name, off in self.off.items() if abs(off) > FAR and name not in BASELINES}


def kept(cache: Cache, data: str, budget: str) -> Kept:
    """Return what is kept of a table, the baselines of the one of equal values included; what failed is told of by its absence."""
    place = {name: VALUES if name in BASELINES else budget for name in (*BASELINES, *CONTESTANTS)}
    found = {name: cells_of(cache, f"{data}/{where}/{name}") for name, where in place.items()}
    ranks = {name: cache.ranks.get(f"{data}/{budget}/{name}") for name in CONTESTANTS}
    off = {name: rank["off"] for name, rank in ranks.items() if rank is not None}
    return Kept(f"{data}/{budget}", {name: cells for name, cells in found.items() if cells}, off)


def cells_of(cache: Cache, key: str) -> list[Cell]:
    """Return the kept runs of a contestant, by seed."""
    found = [cache.cells.get(f"{key}/seed {seed}") for seed in SEEDS]
    return [cell for cell in found if cell is not None and "failed" not in cell]


def groups_of(held: Kept, truths: Mapping[str, str], folder: Path) -> dict[str, Group]:
    """Return contestants as groups of a comparison, by name."""
    runs: list[Run] = []
    for name, found in held.cells.items():
        for cell in found:
            unpack(cell, name, where := folder / str(len(runs)), truths)
            runs.append(read_run(where))
    groups = {group.method: group for group in grouped(runs)}
    for group in groups.values():
        assert group.predictions is not None  # read while the folders are there
    return groups


def served(groups: Mapping[str, Group]) -> list[Group]:
    """Return the groups of a table but those that are there again, to be measured at their clients."""
    return [group for name, group in groups.items() if name not in AT_CLIENTS]


def at_clients(groups: Mapping[str, Group]) -> list[Group]:
    """Return the groups that clients measured, each on what it holds out."""
    return [group for group in groups.values() if group.by_clients or group.method in AT_CLIENTS]
