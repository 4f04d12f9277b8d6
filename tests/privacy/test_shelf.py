"""Laws of a node's shelf: rows have one account wherever they lie, across processes and crashes, and strangers have one each."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import stat
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.privacy.charges import Key
from fedsb.privacy.codes import BudgetExceeded
from fedsb.privacy.entries import UNNOISED, Entry
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.naming import name_of_data
from fedsb.privacy.rows import HASH_BYTES, add_hashes, hash_rows, read_hashes
from fedsb.privacy.shelf import JOINED, ROWS, SALT, NodeLedger, Shelf
from tests.privacy.test_naming import old_folder

PLACES = ("p", "q", "r", "s")


def entry(number: int) -> Entry:
    """A release that is told apart by its steps."""
    return Entry("gaussian", 0.5, 2.0, number)


def opened(folder: Path, place: str, texts: tuple[str, ...], ledger: str | None = None) -> NodeLedger:
    shelf = Shelf(folder)
    return shelf.open(name_of_data("a", f"/data/{place}", ledger), hash_rows(texts, None, shelf.salt))


def charge(ledger: Ledger, number: int) -> None:
    ledger.charge(Key("run", number, "train", "a"), [entry(number)])


runs = st.lists(st.tuples(st.sampled_from(PLACES), st.sets(st.sampled_from("abcdefgh"), min_size=1, max_size=3)), min_size=1, max_size=7)


@settings(max_examples=30, deadline=None)
@given(runs=runs)
def test_the_account_of_every_row_holds_all_releases_that_it_was_in(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[str, set[str]]]
) -> None:
    """Against an oracle of rows: who was in which release; and against one of groups: what shares nothing counts nothing."""
    folder = tmp_path_factory.mktemp("shelf") / "ledgers"
    seen: dict[str, set[int]] = {}
    groups: list[tuple[set[str], set[int]]] = []
    for number, (place, rows) in enumerate(runs, start=1):
        ledger = opened(folder, place, tuple(sorted(rows)))
        charge(ledger, number)
        for row in rows:
            seen.setdefault(row, set()).add(number)
        mine = rows | {f"/{place}"}
        touched = [group for group in groups if group[0] & mine]
        groups = [group for group in groups if group not in touched]
        groups.append((mine.union(*(group[0] for group in touched)), {number}.union(*(group[1] for group in touched))))
        found = {held.steps for held in ledger.entries()}
        assert all(seen[row] <= found for row in rows)
        assert found == groups[-1][1]
        assert len(ledger.entries()) == len(found)


def test_rows_without_a_text_join_nothing(tmp_path: Path) -> None:
    charge(opened(tmp_path, "p", ("a", " ", "")), 1)
    assert opened(tmp_path, "q", ("b", " ", "")).entries() == ()
    assert opened(tmp_path, "r", ("c", "a")).entries() == (entry(1),)


def test_a_pair_is_a_row_of_its_own() -> None:
    salt = bytes(32)
    whole = [
        hash_rows(texts, pairs, salt) for texts, pairs in ((["ab"], ["c"]), (["a"], ["bc"]), (["abc"], None), (["ab", "ab"], ["c", "c"]))
    ]
    assert [len(found) for found in whole] == [1, 1, 1, 1]
    assert len({int(found[0]) for found in whole}) == 3
    assert not np.isin(whole[0], hash_rows(["ab"], ["c"], bytes(31) + b"1")).any()


def test_what_lies_there_is_the_owners_alone_and_says_no_row(tmp_path: Path) -> None:
    home = tmp_path / "home"
    ledger = opened(home / "ledgers", "p", ("a secret of somebody's",))
    assert stat.S_IMODE((home / "ledgers").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "ledgers" / SALT).stat().st_mode) == 0o600
    assert (ledger.folder / ROWS).stat().st_size == HASH_BYTES
    assert json.loads(ledger.path.read_text())["data"] == "p"


def test_a_ledger_of_an_earlier_version_is_charged_on(tmp_path: Path) -> None:
    """Both of them where one file was served under two names."""
    for number, written in enumerate(("/data/p", "/data/p/../p"), start=1):
        charge(Ledger(tmp_path / f"{number}{old_folder(written)}", {"unit": "example"}), number)
    charge(Ledger(tmp_path / old_folder("/data/q"), {"unit": "example"}), 3)
    assert set(opened(tmp_path, "p", ("a",)).entries()) == {entry(1), entry(2)}
    charge(Ledger(tmp_path / "a", {"unit": "example"}), 4)
    shelf = Shelf(tmp_path)
    assert shelf.open(name_of_data("a", None), hash_rows(["b"], None, shelf.salt)).entries() == (entry(4),)


def test_data_that_an_operator_names_have_one_ledger_whatever_their_version(tmp_path: Path) -> None:
    charge(opened(tmp_path, "v1", ("a",)), 1)
    charge(opened(tmp_path, "v1", ("b",), "cohort"), 2)
    charge(opened(tmp_path, "v2", ("c",), "cohort"), 3)
    assert len(opened(tmp_path, "v3", ("d",), "cohort").entries()) == 3
    assert len(opened(tmp_path, "v2", ("e",)).entries()) == 3, "without its name again"
    assert opened(tmp_path, "v4", ("f",)).entries() == ()


def test_a_budget_is_that_of_the_whole_account(tmp_path: Path) -> None:
    charge(opened(tmp_path, "p", ("a",)), 5)
    other = opened(tmp_path, "q", ("a", "b"))
    with pytest.raises(BudgetExceeded):
        other.charge(Key("run", 1, "train"), [entry(2)], limit=lambda entries: sum(e.steps for e in entries) <= 6)
    other.charge(Key("run", 1, "train"), [UNNOISED], limit=lambda entries: math.isfinite(len(entries)))
    assert UNNOISED in opened(tmp_path, "p", ("a",)).entries()


@given(
    st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("12"), st.integers(1, 4)), max_size=6),
    st.sampled_from("12"),
    st.integers(1, 12),
)
@settings(max_examples=25)
def test_a_budget_of_a_run_is_that_of_its_releases_in_the_whole_account(charged: list[tuple[str, str, int]], run: str, most: int) -> None:
    with TemporaryDirectory() as folder:
        for place, of_run, steps in charged:
            opened(Path(folder), place, ("a",)).charge(Key(of_run, 1, "train"), [entry(steps)])
        spent = sum(steps for _, of_run, steps in charged if of_run == run)
        seen: list[int] = []

        def within(entries: tuple[Entry, ...]) -> bool:
            seen.append(sum(each.steps for each in entries))
            return seen[-1] <= most

        ledger, before = opened(Path(folder), "q", ("a",)), len(charged)
        with nullcontext() if spent + 2 <= most else pytest.raises(BudgetExceeded):
            ledger.charge(Key(run, 2, "train"), [entry(2)], run_limit=within)
        assert seen == [spent + 2]
        assert len(ledger.entries()) == before + (spent + 2 <= most)


def test_a_crash_at_any_byte_leaves_the_rows_noticed(tmp_path: Path) -> None:
    """Whatever of the last line of joined.jsonl and of the last hashes is on the disk, the next opening sees both accounts."""
    charge(opened(tmp_path, "p", ("a", "b")), 1)
    before = (tmp_path / JOINED).read_bytes() if (tmp_path / JOINED).exists() else b""
    other = opened(tmp_path, "q", ("a", "c"))
    joined, rows = (tmp_path / JOINED).read_bytes(), (other.folder / ROWS).read_bytes()
    for end in range(len(before), len(joined) + 1):
        (tmp_path / JOINED).write_bytes(joined[:end])
        (other.folder / ROWS).unlink()
        assert opened(tmp_path, "q", ("a", "c")).entries() == (entry(1),)
    for end in range(len(rows) + 1):
        (other.folder / ROWS).write_bytes(rows[:end])
        assert opened(tmp_path, "q", ("a", "c")).entries() == (entry(1),)
        assert sorted(read_hashes(other.folder / ROWS)) == sorted(np.frombuffer(rows, "<u8"))


def test_a_line_or_a_salt_that_is_gone_is_named(tmp_path: Path) -> None:
    charge(opened(tmp_path, "p", ("a",)), 1)
    opened(tmp_path, "q", ("a",))
    text = (tmp_path / JOINED).read_text()
    (tmp_path / JOINED).write_text("{}\n" + text)
    with pytest.raises(UserError, match="line 1 joins no two ledgers; restore the file"):
        opened(tmp_path, "q", ("a",))
    (tmp_path / JOINED).write_text(text)
    (tmp_path / SALT).unlink()
    with pytest.raises(UserError, match="is gone, and without it no row is known again; restore the file"):
        opened(tmp_path, "q", ("a",))


@pytest.mark.parametrize("lost", ["gone", "empty"])
def test_a_ledger_that_is_gone_beside_its_rows_is_named_and_not_begun_anew(lost: str, tmp_path: Path) -> None:
    """Also where it is another's, whose releases count in the account that is asked for."""
    charge(ledger := opened(tmp_path, "p", ("a", "b")), 1)
    charge(opened(tmp_path, "q", ("a",)), 2)
    whole = ledger.path.read_bytes()
    if lost == "gone":
        ledger.path.unlink()
    else:
        ledger.path.write_bytes(b"")
    for place in ("p", "q"):
        with pytest.raises(UserError, match="is gone, and with it what was charged for rows that are known; restore the file"):
            opened(tmp_path, place, ("a",))
    ledger.path.write_bytes(whole)
    assert {held.steps for held in opened(tmp_path, "q", ("a",)).entries()} == {1, 2}


@pytest.mark.parametrize("place", ["p", "q"])
def test_accounts_find_each_other_again_where_what_joined_them_is_lost(place: str, tmp_path: Path) -> None:
    charge(opened(tmp_path, "p", ("a", "b")), 1)
    charge(opened(tmp_path, "q", ("a",)), 2)
    charge(opened(tmp_path, "r", ("c",)), 3)
    (tmp_path / JOINED).unlink()
    assert {held.steps for held in opened(tmp_path, place, ("d",)).entries()} == {1, 2}


def test_a_hundred_thousand_rows_cost_next_to_nothing(tmp_path: Path) -> None:
    """A second's work on a quiet core; a tenth of that where they are known."""
    texts = [f"row {i} of a table with a text of some forty letters" for i in range(100_000)]
    begun = time.process_time()
    shelf = Shelf(tmp_path)
    rows = hash_rows(texts, None, shelf.salt)
    for place in ("p", "q", "q"):
        shelf.open(name_of_data("a", place), rows)
    assert len(rows) == len(texts)
    assert time.process_time() - begun < 5


def test_hashes_outlive_a_torn_one(tmp_path: Path) -> None:
    add_hashes(tmp_path / ROWS, np.array([1, 2], np.uint64))
    with (tmp_path / ROWS).open("ab") as file:
        file.write(b"abc")
    add_hashes(tmp_path / ROWS, np.array([3], np.uint64))
    assert read_hashes(tmp_path / ROWS).tolist() == [1, 2, 3]


def _work(folder: Path, worker: int) -> None:
    for number in range(10_000):
        place = PLACES[(worker + number) % 4]
        ledger = opened(folder, place, ("shared", f"{place}-{number % 3}"))
        ledger.charge(Key(f"worker-{worker}", number, "train"), [entry(1)])
        print(f"{worker} {number}", file=(folder / f"done-{worker}").open("a"), flush=True)


@pytest.mark.slow
def test_processes_that_are_killed_lose_no_charge(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(4):
        workers = [context.Process(target=_work, args=(tmp_path, worker)) for worker in range(3)]
        for process in workers:
            process.start()
        time.sleep(0.5)
        for process in workers:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    done = sum(len(path.read_text().splitlines()) for path in tmp_path.glob("done-*"))
    charged = sum(len(path.read_text().splitlines()) - 1 for path in tmp_path.glob("*/ledger.jsonl"))
    assert 0 < done <= charged == len(opened(tmp_path, "elsewhere", ("shared",)).entries())


names = st.frozensets(st.sampled_from("123456"), min_size=1, max_size=2)


@given(st.lists(st.tuples(st.sampled_from("pq"), names), max_size=7), names)
@settings(max_examples=40, deadline=None)
def test_a_run_is_all_that_was_charged_under_names_that_hang_together(
    charged: list[tuple[str, frozenset[str]]], asked: frozenset[str]
) -> None:
    """Over both ledgers of one account; against an oracle that walks from name to name."""

    def reached(name: str, seen: set[str]) -> set[str]:
        seen.add(name)
        for _, others in charged:
            for other in others if name in others else ():
                if other not in seen:
                    reached(other, seen)
        return seen

    known: set[str] = set().union(*(reached(name, set()) for name in asked))
    expected = sum(number for number, (_, of) in enumerate(charged, start=1) if of & known)
    with TemporaryDirectory() as folder:
        for number, (place, of) in enumerate(charged, start=1):
            first, *more = sorted(of)
            opened(Path(folder), place, ("a",)).charge(Key(first, 1, "train"), [entry(number)], names=more)
        ledger = opened(Path(folder), "q", ("a",))
        assert sum(each.steps for each in ledger.entries(asked)) == expected
        seen: list[int] = []
        first, *more = sorted(asked)
        ledger.charge(
            Key(first, 2, "train"), [entry(1)], run_limit=lambda all_of: not seen.append(sum(e.steps for e in all_of)), names=more
        )
        assert seen == [expected + 1]
