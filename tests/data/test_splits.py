"""Splits: stratified, disjoint, repeatable, and independent of one another."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.data import Examples, hold_out, load_corpus, load_site, load_test
from fedsb.data.splits import draw

ROWS = [{"text": f"t{i}", "label": "abc"[i % 7 % 3], "site": f"s{i % 2}"} for i in range(70)]


def _examples(targets):
    return Examples(tuple(map(str, range(len(targets)))), targets=tuple(targets))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0.01, 0.99), st.booleans())
def test_a_draw_is_within_one_of_its_share_in_every_class(targets, fraction, leave_one):
    chosen = draw(_examples(targets), fraction, np.random.default_rng(0), leave_one=leave_one)
    drawn, there = Counter(targets[i] for i in chosen), Counter(targets)
    assert len(set(chosen.tolist())) == len(chosen)
    assert all(abs(drawn[label] - fraction * count) < 1 + 1e-9 for label, count in there.items())
    if leave_one:
        assert all(drawn[label] < count for label, count in there.items())
    else:
        assert len(chosen) == round(sum(fraction * count for count in there.values()))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0.01, 0.99))
def test_a_draw_takes_one_of_each_class_while_there_is_room(targets, fraction):
    plain, spread = (draw(_examples(targets), fraction, np.random.default_rng(0), take_one=one) for one in (False, True))
    assert len(spread) == len(plain) == len(set(spread.tolist()))
    assert len({targets[i] for i in spread}) == min(len(set(targets)), len(plain))


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=50), st.floats(0.01, 0.99))
def test_numbers_are_drawn_plainly(targets, fraction):
    assert len(draw(_examples(targets), fraction, np.random.default_rng(0))) == round(fraction * len(targets))


@given(st.lists(st.integers(0, 2), max_size=30), st.floats(0, 0.9), st.integers(0, 5))
def test_hold_out_is_a_disjoint_cover_in_order(targets, fraction, seed):
    examples = _examples(targets)
    train, held = hold_out(examples, fraction, seed=seed, client="a")
    assert sorted([*train.texts, *held.texts], key=int) == list(examples.texts)
    assert list(train.texts) == sorted(train.texts, key=int)
    assert (train, held) == hold_out(examples, fraction, seed=seed, client="a")


def test_parts_are_disjoint_and_cover_the_rows(data_config, table):
    corpus = load_corpus(data_config(path=table(ROWS), public_fraction=0.2), 3, "site")
    parts = [corpus.train, corpus.test, corpus.public]
    assert sorted(text for part in parts for text in part.texts) == sorted(row["text"] for row in ROWS)
    assert [len(part) for part in parts] == [40, 20, 10]
    assert corpus.labels == ("a", "b", "c")
    by_text = {row["text"]: row for row in ROWS}
    for text, target, owner in zip(corpus.train.texts, corpus.train.targets, corpus.train.owners, strict=True):
        assert (corpus.labels[target], owner) == (by_text[text]["label"], by_text[text]["site"])


def test_a_seed_repeats_and_another_differs_and_no_global_generator_moves(data_config, table):
    cfg = data_config(path=table(ROWS), max_examples=50)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert load_corpus(cfg, 1) == load_corpus(cfg, 1)
    assert load_corpus(cfg, 1) != load_corpus(cfg, 2)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_a_public_part_does_not_move_the_test_part(data_config, table):
    path = table(ROWS)
    plain, public = (load_corpus(data_config(path=path, public_fraction=share), 0) for share in (0.0, 0.1))
    assert plain.test == public.test
    assert plain.public is None


def test_max_examples_thins_by_class_and_keeps_given_test_rows(data_config, table):
    cfg = data_config(path=table(ROWS), test_path=table(ROWS[:9], "held/test.jsonl"), max_examples=35)
    corpus = load_corpus(cfg, 0)
    assert (len(corpus.train), len(corpus.test)) == (35, 9)
    counts, shares = Counter(corpus.train.targets), Counter(row["label"] for row in ROWS)
    assert all(abs(counts[i] - shares[name] / 2) < 1 for i, name in enumerate(corpus.labels))


def test_a_public_file_is_read_with_the_labels_of_the_training_part(data_config, table):
    cfg = data_config(path=table(ROWS), public_path=table(ROWS[1:2], "public.jsonl"))
    assert load_corpus(cfg, 0).public.targets == (1,)


def test_a_server_with_only_a_test_file_has_an_empty_training_part(data_config, table):
    corpus = load_test(data_config(test_path=table(ROWS, "test.jsonl"), labels=("c", "b", "a")))
    assert (len(corpus.train), len(corpus.test), corpus.labels) == (0, 70, ("c", "b", "a"))
    with pytest.raises(UserError, match=r"data.test_path must be given on a server"):
        load_test(data_config())


def test_a_site_keeps_the_order_of_its_file_and_refuses_foreign_labels(data_config, table):
    path = table(ROWS, "site/train.jsonl")
    site = load_site(data_config(), path, ("c", "b", "a"))
    assert site.texts == tuple(row["text"] for row in ROWS)
    assert site.targets[:3] == (2, 1, 0)
    with pytest.raises(UserError, match=r"label 'c' \(row 3 of the client's own data\) is not a label of the run, which has a, b"):
        load_site(data_config(), path, ("a", "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_fraction": 0.001}, r"data.test_fraction=0.001 of 70 examples leaves the test part empty"),
        ({"public_fraction": 0.001}, r"data.public_fraction=0.001 of 50 examples leaves the public part empty"),
        ({"test_path": "a", "test_split": "b"}, r"data.test_path=a and data.test_split=b both name the test part"),
        ({"public_path": "a", "public_fraction": 0.5}, r"data.public_path=a and data.public_fraction=0.5 both"),
        ({"test_split": "test"}, r"there is no table 'test'; choose from rows"),
    ],
)
def test_a_split_that_cannot_be_is_one_line(changes, message, data_config, table):
    with pytest.raises(UserError, match=message):
        load_corpus(data_config(path=table(ROWS), **changes), 0)
