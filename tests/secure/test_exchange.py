"""An exchange gives the sum of those who stayed, and whoever asks otherwise gets nothing."""

from __future__ import annotations

import pytest

from fedsb.secure.masks import Words
from fedsb.secure.party import Party
from fedsb.secure.session import SecureError, Session
from fedsb.secure.shamir import SHARE
from fedsb.secure.threshold import threshold_of
from tests.secure.exchanges import SESSION, TERMS, Exchange, plain_sum, whole, words_of

SIX = [f"client-{i}" for i in range(6)]
WORDS: dict[str, Words] = {name: words_of(name) for name in SIX}


@pytest.mark.parametrize(
    ("before_shares", "after_shares", "silent"),
    [
        ("", "", ""),
        ("", "0", ""),
        ("", "03", ""),
        ("5", "", ""),
        ("5", "0", ""),
        ("", "", "12"),
        ("", "3", "1"),
        ("5", "", "1"),
    ],
)
def test_the_sum_is_that_of_those_who_stayed(before_shares: str, after_shares: str, silent: str) -> None:
    """Clients drop out before they give shares, after it and before they send anything, or when they are asked for shares of others."""
    before, after, at_the_end = ([f"client-{i}" for i in some] for some in (before_shares, after_shares, silent))
    exchange = Exchange(SIX)
    exchange.give(dropped=before)
    exchange.send(WORDS, dropped=after)
    stayed = [name for name in SIX if name not in (*before, *after)]
    assert (exchange.end(at_the_end) == plain_sum([WORDS[name] for name in stayed])).all()


def test_below_the_threshold_nothing_is_unmasked() -> None:
    exchange = Exchange(SIX)
    exchange.give()
    exchange.send(WORDS, dropped=SIX[:3])
    for name in SIX[3:]:
        with pytest.raises(SecureError, match="3 clients are in the sum, and this one gives its part to no less than 4"):
            exchange.parties[name].confirm(exchange.server.arrived)
    full = whole(SIX, WORDS)
    with pytest.raises(SecureError, match="3 clients gave their shares, 4 are needed"):
        full.end(silent=SIX[:3])


def test_a_client_gives_one_share_of_each_and_never_both() -> None:
    exchange = Exchange(SIX)
    exchange.give()
    exchange.send(WORDS, dropped=["client-2"])
    party = exchange.parties["client-0"]
    shares = dict(party.shares)
    exchange.confirm()
    said = exchange.answer("client-0")
    assert {len(share) for share in said.values()} == {SHARE}
    for name in SIX:
        own, pairs = shares[name][:SHARE], shares[name][SHARE:]
        assert own != pairs
        assert said[name] == (pairs if name == "client-2" else own)
    assert exchange.answer("client-0") == said
    for others in (SIX, [name for name in SIX if name not in ("client-2", "client-3")]):
        with pytest.raises(SecureError, match="over other clients than this one has confirmed"):
            party.answer(others, exchange.server.confirmed_for("client-0"))
    with pytest.raises(SecureError, match="is unmasked"):
        party.confirm(exchange.server.arrived)


@pytest.mark.parametrize(
    "survivors", [[*SIX[1:]], [*SIX[:4], "client-9"], [*SIX, "client-9"]], ids=["without itself", "a stranger", "all and a stranger"]
)
def test_survivors_that_cannot_be_are_refused(survivors: list[str]) -> None:
    party = whole(SIX, WORDS).parties["client-0"]
    with pytest.raises(SecureError, match="not those that could be"):
        party.confirm(survivors)


def test_who_has_sent_nothing_answers_nothing() -> None:
    exchange = Exchange(SIX)
    exchange.give()
    with pytest.raises(SecureError, match="not those that could be"):
        exchange.parties["client-0"].confirm(SIX)
    with pytest.raises(SecureError, match="than this one has confirmed"):
        exchange.parties["client-0"].answer(SIX, {})


@pytest.mark.parametrize(
    "how", ["nobody", "too few", "over others", "of another exchange", "meant for another", "its own sent back", "cut"]
)
def test_shares_are_given_where_as_many_as_must_stay_confirm_the_same_clients(how: str) -> None:
    """Four of six must: the client itself and three others."""
    exchange = whole(SIX, WORDS)
    exchange.confirm()
    told = exchange.server.confirmed_for("client-0")
    sent = exchange.server.confirmed["client-0"]
    another = Exchange(SIX, session=Session(SESSION.run, SESSION.round, bytes(16), SESSION.settings))
    another.give()
    another.send(WORDS)
    another.confirm()
    fewer = whole(SIX, WORDS)
    for name in SIX[1:5]:
        fewer.server.confirmed[name] = fewer.parties[name].confirm(SIX[:5])
    wrong = {
        "nobody": {},
        "too few": {name: told[name] for name in SIX[1:3]},
        "over others": fewer.server.confirmed_for("client-0"),
        "of another exchange": another.server.confirmed_for("client-0"),
        "meant for another": {**exchange.server.confirmed_for("client-1"), "client-2": told["client-2"]},
        "its own sent back": sent,
        "cut": {name: each[:8] for name, each in told.items()},
    }[how]
    party = fewer.parties["client-0"] if how == "over others" else exchange.parties["client-0"]
    party.confirm(SIX)
    with pytest.raises(SecureError, match=r"[123] clients confirm who is in the sum, and this one gives its part to no less than 4"):
        party.answer(SIX, wrong)
    assert not party.said
    assert party.shares
    right = {name: told[name] for name in SIX[1:4]}
    if party is exchange.parties["client-0"]:
        assert party.answer(SIX, {**right, "client-5": bytes(16)})  # what one liar sends costs nobody the sum


def test_a_client_confirms_one_sum_of_an_exchange() -> None:
    exchange = whole(SIX, WORDS)
    party = exchange.parties["client-0"]
    assert party.confirm(SIX) == party.confirm([*reversed(SIX)])
    with pytest.raises(SecureError, match="other clients were confirmed to be in the sum before"):
        party.confirm(SIX[:5])


def test_clients_that_stay_and_confirm_nothing_are_in_the_sum() -> None:
    exchange = whole(SIX, WORDS)
    exchange.confirm(silent=["client-1", "client-4"])
    exchange.answers = {name: exchange.answer(name) for name in SIX if name not in ("client-1", "client-4")}
    assert (exchange.server.unmasked(exchange.answers, TERMS) == plain_sum([*WORDS.values()])).all()


def test_another_upload_is_never_masked_by_the_same_keys() -> None:
    exchange = whole(SIX, WORDS)
    party, sealed = exchange.parties["client-0"], exchange.server.sealed_for("client-0")
    assert (party.mask(WORDS["client-0"], sealed, TERMS) == exchange.masked["client-0"]).all()
    with pytest.raises(SecureError, match="another upload was masked"):
        party.mask(WORDS["client-1"], sealed, TERMS)
    with pytest.raises(SecureError, match="another upload was masked"):  # the same beside others: fewer masks would be on it
        party.mask(WORDS["client-0"], {name: sealed[name] for name in SIX[1:5]}, TERMS)


def test_keys_are_shown_once() -> None:
    exchange = Exchange(SIX)
    party = exchange.parties["client-0"]
    sealed = party.give(exchange.server.advertised)
    assert party.give(dict(exchange.server.advertised)) == sealed
    with pytest.raises(SecureError, match="other keys than before"):
        party.give({name: exchange.server.advertised[name] for name in SIX[:5]})


def test_a_client_knows_its_own_keys_and_the_number_that_it_needs() -> None:
    exchange = Exchange(SIX)
    advertised = exchange.server.advertised
    with pytest.raises(SecureError, match="not its own"):
        exchange.parties["client-0"].give({**advertised, "client-0": advertised["client-1"]})
    with pytest.raises(SecureError, match="3 clients are in the sum"):
        exchange.parties["client-0"].give({name: advertised[name] for name in SIX[:3]})
    with pytest.raises(SecureError, match="have 5 bytes"):
        exchange.parties["client-0"].give({**advertised, "client-1": b"short"})


def test_shares_of_another_client_or_another_exchange_are_none() -> None:
    exchange = Exchange(SIX)
    exchange.give()
    sealed = exchange.server.sealed_for("client-0")
    swapped = {**sealed, "client-1": sealed["client-2"], "client-2": sealed["client-1"]}
    with pytest.raises(SecureError, match="is not of 'client-1'"):
        exchange.parties["client-0"].mask(WORDS["client-0"], swapped, TERMS)
    other = Exchange(SIX, session=Session(SESSION.run, SESSION.round, bytes(16), SESSION.settings))
    other.give()
    with pytest.raises(SecureError, match="is not of 'client-1'"):
        exchange.parties["client-0"].mask(WORDS["client-0"], other.server.sealed_for("client-0"), TERMS)


def test_a_key_of_small_order_is_none() -> None:
    exchange = Exchange(SIX)
    advertised = exchange.server.advertised
    forged = bytes(64) + advertised["client-1"][64:]
    with pytest.raises(SecureError, match="the key of 'client-1' is none"):
        exchange.parties["client-0"].give({**advertised, "client-1": forged})


def test_who_is_told_otherwise_is_in_no_sum() -> None:
    """Masks with it do not cancel, also where it has dropped out again."""
    exchange = Exchange(SIX, terms={"client-1": b"another weight"})
    exchange.give()
    exchange.send(WORDS)
    assert not (exchange.end() == plain_sum([*WORDS.values()])).any()
    gone = Exchange(SIX, terms={"client-1": b"another weight"})
    gone.give()
    gone.send(WORDS, dropped=["client-1"])
    assert (gone.end() == plain_sum([WORDS[name] for name in SIX if name != "client-1"])).all()


def test_keys_are_new_in_each_exchange() -> None:
    one, other = (Party.begun(SESSION, "client-0", 2, lambda body: bytes(96)) for _ in range(2))
    assert {one.secrets.own, one.secrets.masking, one.secrets.sealing}.isdisjoint(
        {other.secrets.own, other.secrets.masking, other.secrets.sealing}
    )


@pytest.mark.parametrize(
    ("cohort", "dropout", "threshold"),
    [(2, 0.4, 2), (3, 0.34, 2), (3, 0.3, 3), (5, 0.4, 3), (10, 0.3, 7), (25, 0.5, 13), (4, 0.5, 3), (1, 0.0, 2)],
)
def test_the_threshold_follows_the_share_and_is_more_than_half(cohort: int, dropout: float, threshold: int) -> None:
    assert threshold_of(cohort, dropout) == threshold
    assert 2 * threshold > cohort
