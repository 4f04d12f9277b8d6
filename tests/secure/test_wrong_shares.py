"""A sum is unmasked by the shares that fit what was advertised, and who gave others is known."""

from __future__ import annotations

import pytest

from fedsb.secure.masks import Words
from fedsb.secure.session import SecureError
from tests.secure.exchanges import TERMS, Exchange, plain_sum, words_of

EIGHT = [f"client-{i}" for i in range(8)]
SIX = EIGHT[:6]
WORDS: dict[str, Words] = {name: words_of(name) for name in SIX}


@pytest.mark.parametrize("liars", [("client-0",), ("client-2",), ("client-1", "client-4"), ("client-0", "client-1", "client-2")])
@pytest.mark.parametrize("wrong", [bytes(31) + b"\1", bytes(32), b"\xff" * 32], ids=["another", "zeros", "ones"])
@pytest.mark.parametrize("about", ["all", "client-6", "client-7"], ids=["of all", "of one who stayed", "of one who dropped out"])
def test_wrong_shares_cost_no_sum_where_enough_are_right(liars: tuple[str, ...], wrong: bytes, about: str) -> None:
    """Of eight clients one has dropped out, and of the seven that answer four are enough, wherever the others stand."""
    exchange, words = Exchange(EIGHT, dropout=0.4), {name: words_of(name) for name in EIGHT}
    exchange.server.threshold = 4
    for party in exchange.parties.values():
        party.threshold = 4
    exchange.give()
    exchange.send(words, dropped=["client-7"])
    exchange.end()
    answers = {name: dict(said) for name, said in exchange.answers.items()}
    for liar in liars:
        answers[liar].update({name: wrong for name in answers[liar] if about in ("all", name)})
    exchange.server.wrong.clear()
    assert (exchange.server.unmasked(answers, TERMS) == plain_sum([words[name] for name in EIGHT[:7]])).all()
    needed = {liar for liar in liars if liar < "client-4"}  # whose shares stood among the first four
    assert needed <= exchange.server.wrong <= {*liars}


def test_where_too_few_shares_are_right_it_is_said_of_whom() -> None:
    """Of six clients four must stay; of five answers two are wrong, or one client has dealt out wrong shares of its own."""
    exchange = Exchange(SIX)
    exchange.give()
    exchange.send(WORDS, dropped=["client-5"])
    exchange.end()
    for about in ("client-1", "client-5"):
        wrong = {name: dict(said) for name, said in exchange.answers.items()}
        for liar in ("client-0", "client-3"):
            wrong[liar][about] = bytes(31) + b"\1"
        with pytest.raises(SecureError, match=f"no 4 of the 5 shares that were given of '{about}' give the key that it has advertised"):
            exchange.server.unmasked(wrong, TERMS)
