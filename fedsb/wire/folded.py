"""The sum of what the frozen log adds, in place of deltas that nobody can be sent any more.

Who is so far behind that the ranks to send outweigh a module's matrix is sent the whole sum, and ranks to the head only grow: from where
that holds of all its modules on, the ``U`` and ``V`` of a delta are in no bundle again, whoever asks. What was added up to some version is
then kept as one sum a module, in the form in which holders have it, made by the same function of the deltas in version order; and each
delta up to it is dropped when its time has come. So a log holds about a matrix a module, and deltas that outweigh none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedsb.adapters.residual import dense_is_cheaper
from fedsb.core.state import State


@dataclass
class Folded:
    """What stands in place of deltas.

    Attributes:
        version: up to which all that was added is in the sums; 0: there are none.
        sums: of each module ``D@v`` (m, n), or pairs ``U@v`` (m, ρ) and ``V@v`` (ρ, n) where it is held as those.
        first: the first version whose ``U`` and ``V`` were dropped; 0: none was.
        last: of each module the last such version.
    """

    version: int = 0
    sums: State = field(default_factory=State)
    first: int = 0
    last: dict[str, int] = field(default_factory=dict)

    def onto(self, version: int, sums: State) -> Folded:
        """Return one of later sums."""
        return Folded(version, sums, self.first, dict(self.last))

    def note(self, version: int, delta: State) -> None:
        """Note that a delta was dropped."""
        for module in delta.pick("U").modules:
            self.first = min(self.first or version, version)
            self.last[module] = max(version, self.last.get(module, 0))

    def since(self, version: int) -> set[str]:
        """Return the modules to which something was added after a version that has been dropped: it can be sent as a whole alone."""
        return {module for module, last in self.last.items() if last > version}


def outweighed(deltas: Mapping[int, State], shapes: Mapping[str, tuple[int, int]], folded: Folded) -> set[int]:
    """Return the versions whose ``U`` and ``V`` are never sent again: from them to the head all their modules' ranks exceed mn / (m + n).

    Args:
        deltas: by version, in order.
        shapes: (m, n) by module.
        folded: what is not among them any more.
    """
    ranks: dict[str, int] = {}
    found = set()
    for version in sorted(deltas, reverse=True):
        lefts = deltas[version].pick("U")
        for name, left in lefts.items():
            ranks[name.module] = ranks.get(name.module, 0) + left.shape[1]
        whole = folded.since(version)
        if lefts and all(module in whole or dense_is_cheaper(ranks[module], *shapes[module]) for module in lefts.modules):
            found.add(version)
    return found
