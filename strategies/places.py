"""Who may serve a client of a real federation, where several nodes name it, or one comes back, or brings other data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

ONE_OF_TWO = "stop one of them, or let the later one serve by federation.replace_nodes=true"


@dataclass(frozen=True)
class Claim:
    """That a node names a client and has so many examples of it."""

    client: str
    count: int


@dataclass(frozen=True)
class Notice:
    """A line for a node's own log."""

    node: int
    text: str


class Places:
    """The place of each client, and the nodes that name it.

    Before work begins two nodes that name one client keep each other out. From then on who has the place keeps it while it is online,
    and after that whoever comes alone with as many examples: a node that is started again has another number. ``replace`` lets the
    later one in, always.

    Args:
        clients: names of the logical clients.
        counts: training examples by client; added to as places are taken.
        replace: whether a later node takes the place of an earlier one.
    """

    def __init__(self, clients: Sequence[str], counts: dict[str, int], *, replace: bool = False) -> None:
        self._clients = tuple(clients)
        self._counts = counts
        self._replace = replace
        self._settled = False
        self._online: set[int] = set()
        self._claims: dict[int, Claim] = {}  # of nodes that are online, in the order in which they came
        self._holder: dict[str, int] = {}  # the last node that had the place
        self._outcome: dict[str, tuple[int | None, str]] = {}
        self._told: dict[int, str] = {}
        self.remarks: list[str] = []  # what has happened since they were last taken

    @property
    def nodes(self) -> set[int]:
        """The nodes that have said whom they serve."""
        return set(self._claims)

    def see(self, online: Collection[int]) -> None:
        """Note who is online; a node that was away is asked anew, for it may have been started with other data."""
        self._online = set(online)
        self._claims = {node: claim for node, claim in self._claims.items() if node in self._online}

    def claim(self, node: int, client: str, count: int) -> None:
        """Note whom a node names."""
        self._claims[node] = Claim(client, count)

    def settle(self) -> None:
        """Let everyone keep its place from now on: work begins."""
        self._settled = True
        for client, (node, _) in self._outcome.items():
            if node is None:
                self._holder.pop(client, None)
            else:
                self._counts[client] = self._claims[node].count

    def node_of(self, client: str) -> int | None:
        """Return the node that has the place of a client and is online."""
        node = self._outcome.get(client, (None, ""))[0]
        return node if node in self._online else None

    def why(self, client: str) -> str:
        """Tell why nobody has the place of a client; nothing where nobody has named it."""
        return self._outcome.get(client, (None, ""))[1]

    def assign(self) -> list[Notice]:
        """Give the places to whom they belong now, and return what nodes must be told that they have not been told yet."""
        notices: list[Notice] = []
        for client in self._clients:
            named = [node for node, claim in self._claims.items() if claim.client == client]
            if named or client in self._holder:
                notices += self._assign(client, named)
        return notices

    def _assign(self, client: str, named: list[int]) -> list[Notice]:
        last = self._holder.get(client)
        node, reason = self._decide(client, named, last)
        self._outcome[client] = node, reason
        if node is not None:
            self._take(client, node, last)
        told = []
        for each in named:
            text = self._text(client, each, node, named, reason)
            if text and self._told.get(each) != text:
                self._told[each] = text
                told.append(Notice(each, text))
                if each != node:
                    self._remark(f"{client}: {reason or f'node {each} names it too and gets no work, node {node} serves it'}")
        return told

    def _decide(self, client: str, named: list[int], last: int | None) -> tuple[int | None, str]:
        """Return the node that has the place, or none and the reason."""
        if not named:
            return None, f"its node {last} has gone"
        if self._replace:
            return named[-1], ""
        if last in named and (self._settled or len(named) == 1):
            return last, ""
        if len(named) > 1:
            return None, f"nodes {' and '.join(map(str, named))} both name it; {ONE_OF_TWO}"
        known, count = self._counts.get(client), self._claims[named[0]].count
        return (None, changed(f"node {named[0]}", count, known)) if known not in (None, count) else (named[0], "")

    def _take(self, client: str, node: int, last: int | None) -> None:
        """Put a node into a place, and say so where it was another's or other data's."""
        count, known = self._claims[node].count, self._counts.get(client)
        other = f", with {count} examples where there were {known}" if known not in (None, count) else ""
        if last not in (None, node):
            gone = ", which has gone" if last not in self._claims else f", as federation.replace_nodes={str(self._replace).lower()} says"
            self._remark(f"{client}: node {node} serves it in place of node {last}{gone}{other}")
        elif other:
            self._remark(f"{client}: node {node} serves it{other}")
        self._holder[client] = node
        if self._settled:
            self._counts[client] = count

    def _text(self, client: str, each: int, node: int | None, named: list[int], reason: str) -> str:
        """Return what a node must be told; nothing where all is well."""
        if node is None:
            return f"this node gets no work as '{client}': {reason}"
        if each != node:
            return f"this node gets no work: it names '{client}', and so does node {node}, which serves it; {ONE_OF_TWO}"
        others = ", ".join(str(other) for other in named if other != node)
        if others:
            return f"this node serves '{client}'; node {others} names it too and gets no work"
        return f"this node serves '{client}' from now on" if self._told.get(each) else ""

    def _remark(self, text: str) -> None:
        if text and text not in self.remarks:
            self.remarks.append(text)


def changed(who: str, count: int, known: int | None) -> str:
    """Say that a client's number of examples is another one, and how to go on."""
    return (
        f"{who} has {count} examples, and there were {known} when the run began; "
        "bring them back, begin another run, or take the new data by federation.replace_nodes=true"
    )
