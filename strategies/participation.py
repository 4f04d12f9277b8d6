"""How clients take part in a run, and who is told how it goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedsb.core.state import State
from fedsb.run.records import RoundRecord
from fedsb.wire.frozen import FrozenLog
from strategies.privacy.client_unit import ClientPrivacy
from strategies.weighting import WEIGHTINGS, Weighting

LOG = logging.getLogger(__name__)


class Listener(Protocol):
    """Is told how a run goes."""

    def begin(self, round_number: int, clients: Sequence[str], stage: str) -> None:
        """An exchange with these clients begins; ``stage`` tells the exchanges of a start apart and is empty in plain rounds."""

    def reply(self, client: str, ok: bool) -> None:
        """A client's reply counted, or did not."""

    def end(self, record: RoundRecord, state: State, frozen: FrozenLog) -> None:
        """A round is over; ``state`` and ``frozen`` are what clients are sent next."""


@dataclass(frozen=True)
class Participation:
    """How clients take part.

    Attributes:
        clients: names of the logical clients.
        fraction: share of them that a round draws.
        weighting: key of :data:`strategies.weighting.WEIGHTINGS`.
        cutoff: rounds after which ``fedau`` finishes an interval of absence.
        min_replies: a round with fewer valid replies stops the run; None: all of a real federation must answer, one of a simulation.
        wait: seconds to wait for the nodes of a real federation, before the first round and before each.
        replace_nodes: whether a later node takes the place of one that serves its client, and a client may bring other data.
        node_keys: a folder of public keys by client; None: the names under which keys are registered are all that is held.
        evaluate: whether clients evaluate on their held-out parts too.
        evaluated: after which rounds they do; None: after each.
        seed: names the streams of the schedule.
        private: whether epsilon will be claimed for the run: its nodes must be all simulated or all real.
        overrides: of a resumed run, for nodes that don't see its folder; None where nobody knows them.
        resumed: whether the run is.
        ranks: of clients that have one of their own.
        rank: of the server's factors; None where there are none, or nobody is held to it.
        several_ranks: whether nodes of a real federation may have smaller ones.
        begin_anew: whether a client that has lost what it kept of its own begins anew; otherwise its round fails.
        say: shows a line.
        dealt: returns the training examples by client that the server deals out in a simulation, so that it asks no node for what it
            knows; None: it has none to deal.
        pooled: whether the one client holds the examples of all, which no real node can.
        client_unit: clips and noises what they send, at the server; None for plain sums.
    """

    clients: tuple[str, ...]
    fraction: float = 1.0
    weighting: str = "examples"
    cutoff: int = 50
    min_replies: int | None = None
    wait: float = 0.0
    replace_nodes: bool = False
    node_keys: Path | None = None
    evaluate: bool = False
    evaluated: Collection[int] | None = None
    seed: int = 0
    client_unit: ClientPrivacy | None = None
    private: bool = False
    pooled: bool = False
    overrides: str | None = None
    resumed: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    rank: int | None = None
    several_ranks: bool = False
    begin_anew: bool = False
    say: Callable[[str], None] = LOG.info
    dealt: Callable[[], Mapping[str, int]] | None = None

    def evaluates(self, round_number: int) -> bool:
        """Tell whether clients evaluate after a round."""
        return self.evaluate and (self.evaluated is None or round_number in self.evaluated)

    def misfit(self, client: str, rank: int | None) -> str:
        """Say what is wrong with the rank that a client's node has; nothing where it fits, or the node leaves it to the run."""
        if rank is None or self.rank is None:
            return ""
        says, given = f"serves '{client}' with rank={rank}", self.ranks.get(client)
        if given not in (None, rank):
            return f"{says}, and federation.ranks gives that client {given}; make the two equal, or leave rank out of its --node-config"
        if rank != self.rank and not self.several_ranks:
            return f"{says}, and this method has one rank for all, {self.rank}; leave rank out of its --node-config, or take another method"
        if not 1 <= rank <= self.rank:
            return f"{says}, and the server keeps rank={self.rank}; begin the run with rank={rank}, or lower that of the node"
        return ""

    def new_weighting(self) -> Weighting:
        """Return the weighting at the beginning of a run."""
        return WEIGHTINGS[self.weighting](self.clients, self.cutoff)
