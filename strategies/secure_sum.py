"""A round whose uploads the server gets as their sum alone: four exchanges beside the training, and what comes of them.

Keys and shares go round before the training, and from then on a client that drops out costs its summand and nothing else; behind it the
clients that are left confirm to each other who is in it, and unmask the sum of those (see :mod:`fedsb.secure`).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import ArrayRecord

from fedsb.core.errors import RunError
from fedsb.core.state import Layout, State
from fedsb.secure.fixed_point import FixedPoint
from fedsb.secure.gathering import Gathering
from fedsb.secure.keys import CONFIRMED, SEALED
from fedsb.secure.masks import Words
from fedsb.secure.party import ADVERTISED
from fedsb.secure.session import ID, SecureError, Session
from fedsb.secure.shamir import SHARE
from fedsb.secure.threshold import threshold_of
from fedsb.wire.messages import Instruction
from fedsb.wire.secured import TERMS, Secured, bytes_of, joined, masked_layout, parted, sealed_arrays, sealed_layout, words_of
from strategies.inbox import Arrived, LayoutOf
from strategies.transport import Ask

# Takes the type of messages, what it is called, who gets what, what is wanted, and who is asked; see RoundLoop.aside.
Aside = Callable[[str, str, Ask, LayoutOf, Sequence[str]], list[Arrived]]


@dataclass(frozen=True)
class SecureSum:
    """How the uploads of a run are summed.

    Attributes:
        dropout: share of a round's clients that may drop out.
        bound: gives the largest change of a value in a round of a client with so many examples, or fewer.
        settings: digest of the run's configuration, as the clients have it.
    """

    dropout: float
    bound: Callable[[int], float]
    settings: str


class SecureRound:
    """One round.

    Args:
        how: how the uploads are summed.
        session: the exchange; a round that begins again has another.
        cohort: of the round.
        aside: asks clients.
        told: what every message of the round says beside.

    Attributes:
        weights: of the clients whose uploads are in the sum, not normalised.
    """

    def __init__(self, how: SecureSum, session: Session, cohort: Sequence[str], aside: Aside, told: Instruction) -> None:
        self._how = how
        self._cohort = tuple(cohort)
        self._gathering = Gathering(session, threshold_of(len(cohort), how.dropout))
        self._aside = aside
        self._told = told
        self._weights: dict[str, float] = {}
        self._point = FixedPoint(1.0, 1)
        self.weights: dict[str, float] = {}

    @classmethod
    def begun(cls, how: SecureSum, run: str, cohort: Sequence[str], aside: Aside, told: Instruction) -> SecureRound:
        """Begin an exchange of a round with a number of its own."""
        return cls(how, Session(run, told.round, secrets.token_bytes(ID), how.settings), cohort, aside, told)

    def agree(self, counts: Mapping[str, int], weight: Callable[[str, int], float]) -> tuple[str, ...]:
        """Let the cohort exchange keys and shares; return who is to train, in the cohort's order.

        Args:
            counts: training examples by client.
            weight: takes a client and that number.

        Raises:
            RunError: too few clients take part.
        """
        g = self._gathering
        for reply in self._asked("train.keys", "keys", self._cohort, (), self._alike(b""), sealed_layout(ADVERTISED)):
            g.advertised[reply.client] = bytes_of(reply.state)
        self._hold(len(g.advertised), "showed keys")
        members = sorted(g.advertised)
        wanted = sealed_layout(SEALED * (len(members) - 1))
        for reply in self._asked("train.shares", "shares of keys", members, members, self._alike(joined(g.advertised)), wanted):
            others = [name for name in members if name != reply.client]
            g.sealed[reply.client] = parted(bytes_of(reply.state), others, SEALED)
        self._hold(len(g.sealed), "gave shares of their keys")
        order = tuple(client for client in self._cohort if client in g.sealed)
        self._weights = {client: weight(client, counts.get(client, 0)) for client in order}
        self._point = FixedPoint(self._how.bound(max(counts.get(client, 0) for client in order)), len(order))
        return order

    @property
    def drawn(self) -> int:
        """How many clients the round has drawn."""
        return len(self._cohort)

    @property
    def bound(self) -> float:
        """The largest change of a value in the round."""
        return self._point.bound

    @property
    def wrong(self) -> tuple[str, ...]:
        """Who has given wrong shares, once the sum is unmasked; their uploads are in it."""
        return tuple(sorted(self._gathering.wrong))

    def asking(self, ask: Ask) -> Ask:
        """Return what asks for masked uploads where ``ask`` asks for uploads."""
        members = tuple(sorted(self._gathering.sealed))
        secured = Secured(members, tuple(self._weights[member] for member in members), self._point.bound)

        def masked(client: str) -> tuple[Instruction, ArrayRecord]:
            told, arrays = ask(client)
            return replace(told, secured=secured), self._with(arrays, joined(self._gathering.sealed_for(client)))

        return masked

    def add(self, upload: Arrived) -> float:
        """Add a masked upload to the sum, and return its weight."""
        self._gathering.add(upload.client, words_of(upload.state))
        self.weights[upload.client] = self._weights[upload.client]
        return self._weights[upload.client]

    def moved(self, layout: Layout) -> tuple[State, dict[str, float]]:
        """Unmask the sum and return the weighted mean of the changes, in float64, and what fixed point did to it.

        ``secure_gap`` is the norm of the error that rounding is expected to leave, relative to that of the mean change, and
        ``secure_gap_most`` what it cannot exceed; ``secure_cut`` counts values beyond the bound, over all clients.

        Args:
            layout: of the uploads.

        Raises:
            RunError: too few uploads have arrived, or too few shares: nothing is unmasked.
        """
        weight, k = sum(self.weights.values()) / sum(self._weights.values()), len(self.weights)
        values, cut = self._point.decode(self._unmasked(), weight)
        if cut > k * len(values):
            raise RunError(f"round {self._told.round}: what was unmasked is no sum: the clients were not told the same")
        parts = torch.split(torch.from_numpy(values), [math.prod(shape) for _, shape in layout.shapes])
        moved = State({name: part.view(shape) for (name, shape), part in zip(layout.shapes, parts, strict=True)})
        norm = math.sqrt(float(values @ values))
        scale = math.sqrt(len(values)) / norm if norm else 0.0
        gaps = {"secure_gap": self._point.expected(k, weight) * scale, "secure_gap_most": self._point.worst(k, weight) * scale}
        return moved, {**gaps, "secure_cut": float(cut)}

    def _unmasked(self) -> Words:
        """Return the sum of what has arrived, without masks."""
        self._hold(len(self.weights), "sent an upload")
        survivors, members = sorted(self.weights), sorted(self._gathering.sealed)
        confirmed = self._confirmed(survivors)
        arrays = self._apart(lambda client: joined(self._gathering.confirmed_for(client)))
        replies = self._asked("train.unmask", "unmasking", confirmed, survivors, arrays, sealed_layout(TERMS + SHARE * len(members)))
        said = {reply.client: bytes_of(reply.state) for reply in replies}
        answers = {client: parted(data[TERMS:], members, SHARE) for client, data in said.items()}
        self._hold(len(answers), "gave the shares that unmask the sum")
        terms = {data[:TERMS] for data in said.values()}
        if len(terms) > 1:
            raise RunError(f"round {self._told.round}: the sum can't be unmasked: the clients were not told the same of the round")
        try:
            return self._gathering.unmasked(answers, terms.pop())
        except SecureError as error:
            raise RunError(f"round {self._told.round}: the sum can't be unmasked: {error}") from None

    def _confirmed(self, survivors: Sequence[str]) -> list[str]:
        """Let those in the sum confirm to each other who that is, and return who has; see :meth:`fedsb.secure.party.Party.confirm`."""
        g, wanted = self._gathering, sealed_layout(CONFIRMED * (len(survivors) - 1))
        for reply in self._asked("train.survivors", "who is in the sum", survivors, survivors, self._alike(b""), wanted):
            others = [name for name in survivors if name != reply.client]
            g.confirmed[reply.client] = parted(bytes_of(reply.state), others, CONFIRMED)
        self._hold(len(g.confirmed), "confirmed who is in the sum")
        return sorted(g.confirmed)

    def _asked(
        self, kind: str, title: str, among: Sequence[str], members: Sequence[str], arrays: Callable[[str], ArrayRecord], wanted: Layout
    ) -> list[Arrived]:
        instruction = replace(self._told, secured=Secured(tuple(members)))
        return self._aside(kind, title, lambda client: (instruction, arrays(client)), lambda client: wanted, among)

    def _alike(self, sealed: bytes) -> Callable[[str], ArrayRecord]:
        arrays = self._with(ArrayRecord(), sealed)  # one record: it is encoded once for all
        return lambda client: arrays

    def _apart(self, sealed: Callable[[str], bytes]) -> Callable[[str], ArrayRecord]:
        return lambda client: self._with(ArrayRecord(), sealed(client))

    def _with(self, arrays: ArrayRecord, sealed: bytes) -> ArrayRecord:
        return ArrayRecord({**arrays, **sealed_arrays(self._gathering.session.id + sealed)})

    def _hold(self, found: int, what: str) -> None:
        if found < self._gathering.threshold:
            raise RunError(
                f"round {self._told.round}: {found} of {len(self._cohort)} clients {what}, and a secure sum needs "
                f"{self._gathering.threshold} (federation.secure_dropout={self._how.dropout:g}); nothing was unmasked"
            )


def masked_of(layout: LayoutOf) -> LayoutOf:
    """Return the layouts of masked uploads where ``layout`` gives those of uploads."""
    return lambda client: masked_layout(layout(client))
