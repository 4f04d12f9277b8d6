"""How clients take part in a run, and who is told how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedsb.frozen import FrozenLog
from fedsb.report.records import RoundRecord
from fedsb.state import State
from strategies.client_privacy import ClientPrivacy
from strategies.weighting import WEIGHTINGS, Weighting


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
        min_replies: a round with fewer valid replies stops the run.
        wait: seconds to wait for nodes before the first round.
        evaluate: whether clients evaluate on their held-out parts too.
        seed: names the streams of the schedule.
        private: whether epsilon will be claimed for the run: its nodes must be all simulated or all real.
        client_privacy: clips and noises what they send, at the server; None for plain sums.
    """

    clients: tuple[str, ...]
    fraction: float = 1.0
    weighting: str = "examples"
    cutoff: int = 50
    min_replies: int = 1
    wait: float = 0.0
    evaluate: bool = False
    seed: int = 0
    client_privacy: ClientPrivacy | None = None
    private: bool = False

    def new_weighting(self) -> Weighting:
        """Return the weighting at the beginning of a run."""
        return WEIGHTINGS[self.weighting](self.clients, self.cutoff)
