"""Whole exchanges without a network, with everything that the server got on the way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedsb.secure.gathering import Gathering
from fedsb.secure.masks import Words
from fedsb.secure.party import Party
from fedsb.secure.session import Session
from fedsb.secure.signing import UNSIGNED
from fedsb.secure.threshold import threshold_of

SESSION = Session("a" * 32, 3, bytes(range(16)), "settings")

TERMS = b"terms"


def words_of(client: str, size: int = 50) -> Words:
    return np.random.default_rng([*client.encode()]).integers(0, 2**32, size, dtype=np.uint32)


def plain_sum(words: Collection[Words]) -> Words:
    return np.asarray(sum(each.astype(object) for each in words) % 2**32, dtype=np.uint32)


@dataclass
class Exchange:
    """An exchange between clients and the server, step by step; whoever drops out is left out of a later step."""

    clients: list[str]
    dropout: float = 0.34
    session: Session = SESSION
    parties: dict[str, Party] = field(default_factory=dict)
    terms: dict[str, bytes] = field(default_factory=dict)  # of clients that are told others than all
    masked: dict[str, Words] = field(default_factory=dict)
    answers: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = threshold_of(len(self.clients), self.dropout)
        self.server = Gathering(self.session, least)
        for name in self.clients:
            self.parties[name] = Party.begun(self.session, name, least, lambda body: UNSIGNED)
            self.server.advertised[name] = self.parties[name].advertised

    def give(self, dropped: Collection[str] = ()) -> None:
        """Let all but some show shares; a client knows of those who have shown keys alone."""
        for name in self.clients:
            if name not in dropped:
                self.server.sealed[name] = self.parties[name].give(self.server.advertised)

    def send(self, words: Mapping[str, Words], dropped: Collection[str] = ()) -> None:
        for name in self.server.sealed:
            if name not in dropped:
                self.masked[name] = self.parties[name].mask(words[name], self.server.sealed_for(name), self.terms.get(name, TERMS))
                self.server.add(name, self.masked[name])

    def confirm(self, silent: Collection[str] = ()) -> None:
        for name in self.masked:
            if name not in silent:
                self.server.confirmed[name] = self.parties[name].confirm(self.server.arrived)

    def answer(self, name: str) -> dict[str, bytes]:
        return self.parties[name].answer(self.server.arrived, self.server.confirmed_for(name))

    def end(self, silent: Collection[str] = ()) -> Words:
        self.confirm()
        for name in self.masked:
            if name not in silent:
                self.answers[name] = self.answer(name)
        return self.server.unmasked(self.answers, TERMS)


def whole(clients: list[str], words: Mapping[str, Words]) -> Exchange:
    exchange = Exchange(clients)
    exchange.give()
    exchange.send(words)
    return exchange
