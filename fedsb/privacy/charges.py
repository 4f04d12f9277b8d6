"""Lines of a ledger: what they were charged for, and which of them are of one run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from fedsb.privacy.entries import Entry


class Key(NamedTuple):
    """What a charge was made for: the run, the round (0 is the start), the exchange within it, and the client.

    The client is empty where a ledger has one only, and in ledgers of earlier versions.
    """

    run: str
    round: int
    exchange: str
    client: str = ""

    @property
    def written(self) -> tuple[str | int, ...]:
        """The key as files hold it."""
        key = (self.run, self.round, self.exchange)
        return (*key, self.client) if self.client else key


class Charge(NamedTuple):
    """A line of a ledger.

    Attributes:
        key: what it was made for.
        entries: the releases.
        names: that the run had in the message, its key's among them; see :func:`of_one_run`.
    """

    key: Key
    entries: tuple[Entry, ...]
    names: frozenset[str]


def of_one_run(charges: Sequence[Charge], names: Collection[str]) -> list[Charge]:
    """Return the charges of the run that goes by some of these names, or by others that a charge has together with one of them.

    What a message calls its run is the server's word: whoever gives a run another name, or another run its name, has one run of both.
    """
    known = {*names}
    while more := {name for charge in charges if charge.names & known for name in charge.names} - known:
        known |= more
    return [charge for charge in charges if charge.names & known]


def entries_in(charges: Sequence[Charge], run: Collection[str] | None = None) -> tuple[Entry, ...]:
    """Return the releases of charges in order, or of those of one run, by its names."""
    return tuple(entry for charge in (charges if run is None else of_one_run(charges, run)) for entry in charge.entries)
