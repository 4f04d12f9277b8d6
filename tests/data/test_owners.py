"""A natural partition takes its clients from the data: their names, their number, and each its own rows."""

from __future__ import annotations

import pytest

from fedsb.app.assembly import peopled, skew_in
from fedsb.app.client_data import client_examples
from fedsb.config.compose import load
from fedsb.core.errors import UserError

SHOPS = ("north", "south", "10", "9")
ROWS = [{"text": f"t{i}", "label": ("no", "yes")[i % 3 == 0], "shop": SHOPS[i % 4]} for i in range(80)]
NATURAL = ("data=files", "federation.partition.kind=natural")


def natural(table, *more):
    return load([*NATURAL, f"data.path={table(ROWS)}", "federation.partition.column=shop", *more])


def test_owners_are_the_clients_and_each_holds_its_own_rows(table):
    config = peopled(natural(table))
    assert (config.federation.num_clients, set(config.federation.names)) == (4, set(SHOPS))
    for name in config.federation.names:
        train, _ = client_examples(config, name, None, ("no", "yes"))
        assert {ROWS[int(text[1:])]["shop"] for text in train.texts} == {name}
    sizes = skew_in(config).sizes
    assert set(sizes) == set(SHOPS)
    assert max(sizes.values()) <= 20


def test_names_given_by_hand_and_other_partitions_stay_as_they_are(table):
    by_hand = natural(table, "federation.names=[a,b,c,d]")
    assert peopled(by_hand) is by_hand
    assert by_hand.federation.num_clients == 4
    plain = load(["federation.names=[a,b,c]"])
    assert (peopled(plain) is plain, plain.federation.num_clients, load().federation.num_clients) == (True, 3, 10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["federation.num_clients=3"], r"column=shop names 4 owners in the training part for 3 clients; leave federation.num_clients out"),
        (["federation.partition.column=null"], r"natural needs the column that names the owner"),
        (["federation.min_replies=5"], r"federation.min_replies=5 exceeds the 4 clients a round draws"),
    ],
)
def test_what_does_not_fit_the_owners_is_one_line(table, overrides, message):
    with pytest.raises(UserError, match=message):
        peopled(natural(table, *overrides))


def test_no_clients_at_all_are_refused_where_no_table_can_tell():
    with pytest.raises(UserError, match=r"federation.num_clients=0 is out of range; it must be at least 1"):
        load(["federation.num_clients=0"])
