"""Laws of the ledger: nothing that was charged is ever lost, nothing unreadable is skipped, and kept replies come back bit for bit."""

from __future__ import annotations

import json
import math
import multiprocessing
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Name, State
from fedsb.privacy.accounting import Entry
from fedsb.privacy.charges import Key
from fedsb.privacy.ledger import BudgetExceeded, Ledger
from fedsb.privacy.replies import KEPT_ROUNDS, KEPT_RUNS

HEADER = {"client": "hospital-3", "data": "sha256:ab", "unit": "example", "delta": 1e-5, "examples": 150}
TRAIN = Entry("gaussian", 16 / 150, 1.2372837, 5)
START = Entry("gaussian", 1.0, 0.1 + 0.2, 1)


def key(number: int, exchange: str = "train") -> Key:
    return Key("run-1", number, exchange)


def charge_many(folder: Path, worker: int, count: int) -> None:
    ledger = Ledger(folder, HEADER)
    for number in range(count):
        ledger.charge(Key(f"worker-{worker}", number, "train"), [TRAIN])


def test_charges_come_back_in_order_and_exactly(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "deep" / "ledger", HEADER)
    assert ledger.entries() == ()
    ledger.charge(key(0, "start"), [START, TRAIN])
    ledger.charge(key(1), [TRAIN])
    ledger.charge(key(1), [TRAIN])
    again = Ledger(tmp_path / "deep" / "ledger", dict(reversed(HEADER.items())))
    assert again.charges() == [(key(0, "start"), (START, TRAIN)), (key(1), (TRAIN,)), (key(1), (TRAIN,))]
    assert again.entries() == (START, TRAIN, TRAIN, TRAIN)
    assert all(isinstance(k, Key) for k, _ in again.charges())
    lines = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [line.get("attempt") for line in lines] == [None, 1, 1, 2]
    assert lines[0] == {"format": 1, **HEADER}


def test_the_folder_is_the_owners_alone(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger", HEADER)
    assert stat.S_IMODE((tmp_path / "ledger").stat().st_mode) == 0o700


def test_a_crash_at_any_byte_of_the_last_line_loses_no_earlier_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, HEADER)
    ledger.charge(key(1), [START])
    before = ledger.path.read_bytes()
    ledger.charge(key(2), [TRAIN])
    after = ledger.path.read_bytes()
    for end in range(len(before), len(after)):
        ledger.path.write_bytes(after[:end])
        assert ledger.entries() == (START,)
        ledger.charge(key(3), [TRAIN, TRAIN])
        assert Ledger(tmp_path, HEADER).charges() == [(key(1), (START,)), (key(3), (TRAIN, TRAIN))]


def test_a_crash_at_any_byte_of_the_header_leaves_a_ledger_that_opens(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, HEADER)
    header = ledger.path.read_bytes()
    for end in range(len(header)):
        ledger.path.write_bytes(header[:end])
        again = Ledger(tmp_path, HEADER)
        again.charge(key(1), [TRAIN])
        assert again.path.read_bytes().startswith(header)
        assert again.entries() == (TRAIN,)


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"7", b'{"key": ["a", 1]}', b"\xff", b'{"key": ["a", 1, "b"], "entries": [{"q": 1}]}'])
def test_a_line_that_cannot_be_read_is_never_skipped(tmp_path: Path, line: bytes) -> None:
    ledger = Ledger(tmp_path, HEADER)
    for number in (1, 2, 3):
        ledger.charge(key(number), [TRAIN])
    lines = ledger.path.read_bytes().split(b"\n")
    lines[2] = line
    ledger.path.write_bytes(b"\n".join(lines))
    broken = ledger.path.read_bytes()
    for use in (ledger.entries, lambda: ledger.charge(key(4), [TRAIN]), lambda: Ledger(tmp_path, HEADER)):
        with pytest.raises(UserError, match=r"ledger\.jsonl', line 3 is no entry of a privacy ledger"):
            use()
    assert ledger.path.read_bytes() == broken


def test_an_impossible_entry_on_the_disk_is_no_entry(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, HEADER)
    ledger.charge(key(1), [TRAIN])
    ledger.path.write_text(ledger.path.read_text().replace('"steps": 5', '"steps": -5'))
    with pytest.raises(UserError, match="line 2"):
        ledger.entries()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({**HEADER, "delta": 1e-6}, r"was kept with delta = 1e-05, not 1e-06; "),
        ({**HEADER, "client": "x", "unit": "client"}, r'was kept with client = "hospital-3", not "x"; '),
        ({**HEADER, "more": 1}, r"was kept with more = absent, not 1; "),
        ({"client": "hospital-3"}, r'was kept with data = "sha256:ab", not absent; '),
        ({**HEADER, "format": 2}, r"was kept with format = 1, not 2; "),
    ],
)
def test_another_header_is_refused_in_one_line(tmp_path: Path, header: dict[str, object], message: str) -> None:
    Ledger(tmp_path, HEADER).charge(key(1), [TRAIN])
    with pytest.raises(UserError, match=message) as error:
        Ledger(tmp_path, header)
    assert "\n" not in str(error.value)
    assert Ledger(tmp_path, HEADER).entries() == (TRAIN,)


def test_threads_lose_no_charge(tmp_path: Path) -> None:
    threads = [threading.Thread(target=charge_many, args=(tmp_path, worker, 10)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(k for k, _ in Ledger(tmp_path, HEADER).charges()) == [Key(f"worker-{w}", n, "train") for w in range(6) for n in range(10)]


def test_processes_lose_no_charge(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=charge_many, args=(tmp_path, worker, 25)) for worker in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(Ledger(tmp_path, HEADER).charges()) == 75


def test_a_limit_is_checked_and_charged_as_one(tmp_path: Path) -> None:
    """Each of eight threads finds room when it asks; only as many get in as there is room for."""
    refused: list[int] = []

    def room(entries: Sequence[Entry]) -> bool:
        return sum(entry.steps for entry in entries) <= 3 * TRAIN.steps

    def use(number: int) -> None:
        try:
            Ledger(tmp_path, HEADER).charge(key(number), [TRAIN], limit=room)
        except BudgetExceeded:
            refused.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Ledger(tmp_path, HEADER).entries() == (TRAIN,) * 3
    assert len(refused) == 5


def test_a_refused_charge_leaves_no_trace(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, HEADER)
    ledger.charge(key(1), [START])
    content = ledger.path.read_bytes()
    seen: list[Entry] = []
    with pytest.raises(BudgetExceeded, match="does not allow exchange 'train' of round 2"):
        ledger.charge(key(2), [TRAIN], limit=lambda entries: bool(seen.extend(entries)))
    assert seen == [START, TRAIN]
    assert ledger.path.read_bytes() == content
    assert issubclass(BudgetExceeded, RuntimeError)


texts = st.text(max_size=20)
floats = st.floats(allow_nan=False) | st.just(math.inf)


@settings(max_examples=30, deadline=None)
@given(
    st.builds(Key, texts, st.integers(0, 10**6), texts),
    st.lists(st.floats(width=32), max_size=5),
    st.dictionaries(texts, floats, max_size=4),
)
def test_a_kept_reply_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, asked: Key, values: list[float], metrics: dict[str, float]
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger"), HEADER)
    flat = torch.tensor(values, dtype=torch.float32)
    state = State(
        {Name("encoder.0|odd", "R"): flat, Name("encoder.0", "R"): flat.view(-1, 1).expand(-1, 2).T, Name("bias", HEAD): flat[:0]}
    )
    ledger.keep(asked, state, metrics)
    reply = Ledger(ledger.folder, HEADER).kept(asked)
    assert reply is not None
    again, numbers = reply
    assert list(again) == list(state)
    for name, t in state.items():
        assert again[name].dtype == torch.float32
        assert again[name].shape == t.shape
        assert again[name].contiguous().view(torch.int32).tolist() == t.contiguous().view(torch.int32).tolist()
    assert numbers == metrics
    assert ledger.kept(Key(asked.run + "x", asked.round, asked.exchange)) is None
    assert {path.parent for path in ledger.folder.rglob("*")} == {ledger.folder}


def test_an_empty_reply_is_a_reply(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, HEADER)
    assert ledger.kept(key(1)) is None
    ledger.keep(key(1), State(), {})
    assert ledger.kept(key(1)) == (State(), {})


def test_the_replies_of_the_last_rounds_stay_and_the_newest_of_a_key_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, HEADER)
    (tmp_path / "reply-0000000001-dead.part").write_bytes(b"half")
    for number in range(10):
        state = State({Name("a", "R"): torch.randn(4, generator=torch_generator(number, "test"))})
        for exchange in ("train", "evaluate"):
            ledger.keep(key(number, exchange), state, {"steps": number})
            ledger.keep(key(number, exchange), state, {"steps": number + 0.5})
    held = [reply[1]["steps"] for number in range(10) for kind in ("train", "evaluate") if (reply := ledger.kept(key(number, kind)))]
    assert held == [number + 0.5 for number in range(10 - KEPT_ROUNDS, 10) for _ in range(2)]
    assert len(list(tmp_path.iterdir())) == 2 * KEPT_ROUNDS + 1


def test_all_exchanges_of_a_start_stay_and_runs_push_out_none_of_each_other(tmp_path: Path) -> None:
    ledger, runs = Ledger(tmp_path, HEADER), [f"run-{number}" for number in range(KEPT_RUNS)]
    for number in range(12):
        for run in runs:
            ledger.keep(Key(run, 0, f"evidence-{number}"), State(), {"number": number})
    assert all(ledger.kept(Key(run, 0, f"evidence-{number}")) for run in runs for number in range(12))
    ledger.keep(Key("another", 1, "train"), State(), {})
    assert [bool(ledger.kept(Key(run, 0, "evidence-0"))) for run in runs] == [False, *[True] * (KEPT_RUNS - 1)]


def test_replies_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, HEADER)
    ledger.keep(key(1), State(), {"steps": 1})
    [path] = tmp_path.glob("reply-*")
    first, number, _, _, last = path.name.split("-")
    path.rename(tmp_path / f"{first}-{number}-{last}")
    assert ledger.kept(key(1)) == (State(), {"steps": 1})
    ledger.keep(key(2), State(), {})
    assert ledger.kept(key(1)) is not None
    ledger.keep(key(1), State(), {"steps": 2})
    assert ledger.kept(key(1)) == (State(), {"steps": 2})
    assert len(list(tmp_path.glob("reply-*"))) == 2


def test_a_reply_answers_what_it_was_kept_for_and_nothing_else(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, HEADER)
    ledger.keep(key(1), State(), {"steps": 1}, "one")
    assert ledger.kept(key(1), "one") == (State(), {"steps": 1})
    assert ledger.kept(key(1), "another") is None
    assert ledger.kept(key(1)) is None
    assert ledger.answered(key(1))
    ledger.keep(key(1), State(), {"steps": 2}, "another")
    assert ledger.kept(key(1), "one") is None
    assert not ledger.answered(key(2))


def test_keeping_a_reply_again_drops_no_other(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, HEADER)
    for number in [*range(KEPT_ROUNDS), 0, 0, 2]:
        ledger.keep(key(number), State(), {"round": number})
    assert all(ledger.kept(key(number)) == (State(), {"round": number}) for number in range(KEPT_ROUNDS))


def test_a_damaged_reply_is_no_reply(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, HEADER)
    ledger.keep(key(1), State({Name("a", "R"): torch.ones(8)}), {})
    (path,) = tmp_path.glob("reply-*")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-4] + b"\0\0\0\0", b""):
        path.write_bytes(damaged)
        assert ledger.kept(key(1)) is None
    path.write_bytes(whole)
    assert ledger.kept(key(1)) is not None
