"""From everything that the server got no upload can be unmasked, and no sum but that of all who stayed."""

from __future__ import annotations

from contextlib import suppress
from itertools import combinations

import numpy as np
import pytest

from fedsb.secure import keys
from fedsb.secure.keys import KEY
from fedsb.secure.masks import Words, add_masks, adds
from fedsb.secure.session import SecureError
from fedsb.secure.shamir import join
from tests.secure.exchanges import TERMS, Exchange, plain_sum, words_of

FIVE = [f"client-{i}" for i in range(5)]
SIZE = 400


class View:
    """All that an honest-but-curious server holds at the end, and what can be computed from that."""

    def __init__(self, exchange: Exchange) -> None:
        self.session = exchange.session
        self.advertised = dict(exchange.server.advertised)
        self.masked = dict(exchange.masked)
        self.threshold = exchange.server.threshold
        self.numbers = {name: number for number, name in enumerate(sorted(self.advertised), 1)}
        # Which of the two seeds a share is of the server knows, for it says who has arrived.
        self.shares = {name: {holder: said[name] for holder, said in exchange.answers.items() if name in said} for name in FIVE}

    def seed(self, name: str) -> bytes:
        return join({self.numbers[holder]: share for holder, share in [*self.shares[name].items()][: self.threshold]})

    def stripped(self, name: str) -> Words:
        """Return a masked upload without every mask whose key follows from what the server has."""
        found = self.masked[name].copy()
        add_masks(found, [], [keys.own_key(self.seed(name), self.session, name)])
        for other in FIVE:
            if other not in self.masked and other in self.shares and self.shares[other]:
                key = keys.masking_key(self.seed(other), self.session, other)
                pair = keys.pair_key(key, self.advertised[name][KEY : 2 * KEY], self.session, other, name, TERMS)
                add_masks(found, *(([], [pair]) if adds(name, other) else ([pair], [])))
        return found


@pytest.fixture(scope="module", params=[(), ("client-3",)], ids=["all stay", "one drops out"])
def ended(request: pytest.FixtureRequest) -> tuple[Exchange, dict[str, Words]]:
    exchange, words = Exchange(FIVE, dropout=0.4), {name: words_of(name, SIZE) for name in FIVE}
    exchange.give()
    exchange.send(words, dropped=request.param)
    kept = {client: dict(party.shares) for client, party in exchange.parties.items() if party.masked}
    assert (exchange.end() == plain_sum([words[name] for name in exchange.masked])).all()
    for client, shares in kept.items():
        exchange.parties[client].shares = shares  # for the tests to tell one kind from the other: a client has forgotten them
    return exchange, words


def test_of_each_client_one_key_is_given_away_and_no_share_of_the_other(ended: tuple[Exchange, dict[str, Words]]) -> None:
    exchange, _ = ended
    for name in FIVE:
        said = {answer[name] for answer in exchange.answers.values()}
        own = {party.shares[name][:32] for party in exchange.parties.values() if party.masked and name in party.shares}
        masking = {party.shares[name][32:] for party in exchange.parties.values() if party.masked and name in party.shares}
        given, kept = (own, masking) if name in exchange.masked else (masking, own)
        assert len(said & given) >= exchange.server.threshold
        assert not said & kept


def test_no_sum_of_fewer_stands_open(ended: tuple[Exchange, dict[str, Words]]) -> None:
    """Of every proper part of those who stayed, the sum of what is left when all known masks are off is not their sum, in hardly a word."""
    exchange, words = ended
    view = View(exchange)
    stripped = {name: view.stripped(name) for name in exchange.masked}
    for size in range(1, len(stripped) + 1):
        for some in combinations(stripped, size):
            alike = int((plain_sum([stripped[name] for name in some]) == plain_sum([words[name] for name in some])).sum())
            assert alike == (SIZE if size == len(stripped) else 0)


def test_what_is_left_of_an_upload_is_uniform_whatever_it_was() -> None:
    """With zeros for values, what the server can strip an upload down to has the bits of chance: 32 · n fair coins, to five deviations."""
    exchange = Exchange(FIVE, dropout=0.4)
    exchange.give()
    exchange.send({name: np.zeros(4000, np.uint32) for name in FIVE}, dropped=["client-3"])
    assert not exchange.end().any()
    view = View(exchange)
    for name in exchange.masked:
        bits = np.unpackbits(view.stripped(name).view(np.uint8))
        assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5
        assert len({*view.stripped(name).tolist()}) > 3990


def test_an_upload_that_comes_after_its_client_was_given_up_stays_masked() -> None:
    """The server holds the key of the masks with others then, and not the seed of the client's own."""
    exchange, words = Exchange(FIVE, dropout=0.4), {name: words_of(name, SIZE) for name in FIVE}
    exchange.give()
    late = exchange.parties["client-3"].mask(words["client-3"], exchange.server.sealed_for("client-3"), TERMS)
    exchange.send(words, dropped=["client-3"])
    exchange.end()
    view = View(exchange)
    key = keys.masking_key(view.seed("client-3"), view.session, "client-3")
    for other in exchange.masked:
        pair = keys.pair_key(key, view.advertised[other][KEY : 2 * KEY], view.session, "client-3", other, TERMS)
        add_masks(late := late.copy(), *(([], [pair]) if adds("client-3", other) else ([pair], [])))
    assert not (late == words["client-3"]).any()
    add_masks(late, [], [keys.own_key(exchange.parties["client-3"].secrets.own, view.session, "client-3")])
    assert (late == words["client-3"]).all()


def cyclic(names: list[str], threshold: int, kept: int) -> dict[str, list[str]]:
    """Return lists of who has stayed, another for each client, by which the sum over the first ``kept`` clients would stand open.

    Of these their own seeds would be there, of all others those of their masks, each in as many shares as are needed.
    """
    first, rest, go = names[:kept], names[kept:], len(names) - threshold
    gone = {name: {rest[(i + j) % len(rest)] for j in range(1, go + 1)} for i, name in enumerate(rest)}
    for name in first:
        shares = {other: sum(other in some for some in gone.values()) for other in rest}
        gone[name] = {*sorted(rest, key=lambda other: shares[other])[:go]}
    assert all(sum(name in some for some in gone.values()) >= threshold for name in rest)
    return {name: [other for other in names if other not in gone[name]] for name in names}


@pytest.mark.parametrize(("clients", "dropout", "kept"), [(25, 0.48, 2), (25, 0.4, 9), (25, 0.3, 16)])
def test_a_server_that_tells_each_client_another_list_gets_no_share(clients: int, dropout: float, kept: int) -> None:
    """Each list is long enough, and would give the sum of ``kept`` clients, fewer than must stay; it passes all confirmations on."""
    names = [f"client-{i:02d}" for i in range(clients)]
    exchange = Exchange(names, dropout=dropout)
    exchange.give()
    exchange.send({name: words_of(name, 8) for name in names})
    lists = cyclic(names, exchange.server.threshold, kept)
    assert kept < exchange.server.threshold <= min(map(len, lists.values()))
    exchange.server.confirmed = {name: exchange.parties[name].confirm(lists[name]) for name in names}
    for name in names:
        confirmed = exchange.server.confirmed_for(name)
        with pytest.raises(SecureError, match="clients confirm who is in the sum, and this one gives its part to no less than"):
            exchange.parties[name].answer(lists[name], confirmed)
        assert not exchange.parties[name].said


@pytest.mark.parametrize(("traitors", "sums"), [(2, 1), (3, 2)], ids=["fewer than 2 t - n", "as many"])
def test_clients_on_the_servers_side_make_two_sums_of_one_from_a_number_on(traitors: int, sums: int) -> None:
    """Of seven clients five must stay. Traitors confirm to each one what it was told: two lists, however the others are split."""
    names = [f"client-{i}" for i in range(7)]
    lists, honest = (names[:-1], names), names[traitors:]
    answered = []
    for split in range(len(honest)):  # the last is told of itself
        exchange = Exchange(names, dropout=0.3)
        exchange.give()
        exchange.send({name: words_of(name, 8) for name in names})
        told = {name: lists[i >= split] for i, name in enumerate(honest)}
        exchange.server.confirmed = {name: exchange.parties[name].confirm(told[name]) for name in honest}
        given = set()
        for name in honest:
            confirmed = exchange.server.confirmed_for(name)
            for traitor in names[:traitors]:
                sealing = exchange.parties[traitor].secrets.sealing
                public = exchange.server.advertised[name][:KEY]
                confirmed[traitor] = keys.confirmation(sealing, public, exchange.session, (traitor, name), told[name], name)
            with suppress(SecureError):
                exchange.parties[name].answer(told[name], confirmed)
                given.add(tuple(told[name]))
        answered.append(len(given))
    assert max(answered) == sums
