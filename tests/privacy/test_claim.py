"""Laws of a claim: epsilon over clients, who is silent, when there is none; and the lines and codes that go with it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.errors import RunError, UserError
from fedsb.node.refusals import code_of
from fedsb.privacy.claim import NO_MECHANISM, NOT_COVERED, Claim
from fedsb.privacy.codes import BY_NUMBER, CODES, SelfCheckFailed
from fedsb.privacy.ledger import BudgetExceeded
from fedsb.report.table import bound, epsilon_text

NAMES = st.sampled_from("abcdef")
ROUNDS = st.lists(st.tuples(st.dictionaries(NAMES, st.floats(0, 9)), st.sets(NAMES)), max_size=6)


def account(epsilon: float, noise: float = 1.0, delta: float = 1e-5) -> dict[str, float]:
    return {"epsilon": epsilon, "delta": delta, "sampling-rate": 0.5, "noise-multiplier": noise, "steps": 2}


@given(ROUNDS)
def test_the_last_account_of_each_counts_and_who_failed_last_is_silent(rounds: list[tuple[dict[str, float], set[str]]]) -> None:
    claim = Claim("example", "rdp")
    last: dict[str, float] = {}
    silent: set[str] = set()
    for answered, failed in rounds:
        lost = failed - answered.keys()
        claim.note({client: account(epsilon) for client, epsilon in answered.items()}, sorted(lost))
        last |= answered
        silent = (silent - answered.keys()) | lost
    told = claim.epsilon(simulated=False)
    if not last:
        assert told is None
        assert claim.why_none() == "no private client has answered"
        return
    assert told is not None
    assert {client: row["epsilon"] for client, row in told["clients"].items()} == last
    assert (told["max"], told["min"]) == (max(last.values()), min(last.values()))
    assert told["silent"] == sorted(silent)
    assert list(told["clients"]) == sorted(last)


def test_a_ledger_that_can_be_read_breaks_the_silence() -> None:
    ledgers = {"a": account(2.5)}
    claim = Claim("example", "rdp", charged=ledgers.get)
    claim.note({"b": account(1.0, noise=3.0, delta=1e-6)}, ["a", "c"])
    told = claim.final(simulated=True)
    assert told is not None
    assert (told["max"], told["min"], told["silent"], told["delta"]) == (2.5, 1.0, ["c"], 1e-5)
    assert told["noise_multiplier"] == {"max": 3.0, "min": 1.0}
    assert told["not_covered"] == NOT_COVERED["example"]
    assert "not known of 1 client that did not answer last" in epsilon_text({"epsilon": told})


def test_a_claim_keeps_copies_and_not_what_it_was_given() -> None:
    given_account = account(1.0)
    claim = Claim("example", "rdp")
    claim.note({"a": given_account}, ())
    given_account["epsilon"] = 0.0
    told = claim.epsilon(simulated=True)
    assert told is not None
    told["clients"]["a"]["epsilon"] = 0.0
    assert claim.accounts["a"]["epsilon"] == 1.0


def test_a_reason_beats_every_account() -> None:
    claim = Claim("example", "rdp", reason="the start was not noised")
    claim.note({"a": account(1.0)}, ())
    assert claim.epsilon(simulated=True) is claim.final(simulated=True) is None
    assert claim.why_none() == "the start was not noised"


def test_without_a_unit_there_is_no_mechanism() -> None:
    claim = Claim("none", "prv")
    claim.note({"a": account(1.0)}, ())
    assert claim.final(simulated=True) is None
    assert claim.why_none() == NO_MECHANISM


@given(st.floats(0, 1e4))
def test_an_epsilon_is_never_shown_smaller_than_it_is(value: float) -> None:
    shown = float(bound(value))
    assert value - 1e-9 <= shown <= value + 0.01 + 1e-9


@pytest.mark.parametrize(("value", "text"), [(3.0, "3.00"), (3.001, "3.01"), (2.9999, "3.00"), (1.1, "1.10"), (0.0, "0.00"), (None, "inf")])
def test_an_epsilon_is_rounded_up(value: float | None, text: str) -> None:
    assert bound(value) == text


def test_an_exception_travels_as_a_number_of_its_kind() -> None:
    assert code_of(BudgetExceeded("x")) is CODES["budget"]
    assert code_of(UserError("x")) is CODES["refused"]
    assert all(code_of(error) is CODES["failed"] for error in (RuntimeError("x"), RunError("x"), KeyError("x"), MemoryError()))
    assert all(code_of(SelfCheckFailed(name)) is code for name, code in CODES.items())
    assert len(BY_NUMBER) == len(CODES)
    # A failed self-check stops the run, and nothing else does: their numbers are 11 to 20, and all numbers are without a gap.
    stopping = sorted(code.number for code in CODES.values() if code.stops)
    assert stopping == list(range(11, 21))
    assert sorted(BY_NUMBER) == list(range(1, 1 + len(CODES)))


def test_more_than_the_target_is_said_to_come_from_earlier_runs() -> None:
    claim = Claim("example", "rdp", target=3.0)
    account = {"epsilon": 3.65, "delta": 1e-5, "noise-multiplier": 1.0}
    claim.note({"a": account}, ())
    told = epsilon_text({"epsilon": claim.final(simulated=False)})
    assert told.endswith("; more than this run's target of 3, as earlier runs on a node's data count too")
    claim.note({"a": account | {"epsilon": 2.99}}, ())
    assert "target" not in epsilon_text({"epsilon": claim.final(simulated=False)})
