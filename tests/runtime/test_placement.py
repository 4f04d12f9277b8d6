"""Which card is whose, for every number of them, without one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.runtime.placement import Placement, Seat, fitting, most_workers, place

CASES = {
    "no card": (("auto", None, None, 0), Placement(0.0, "cpu")),
    "a card: the worker's": (("auto", None, None, 1), Placement(1.0, "cpu", 1)),
    "two cards, two workers": (("auto", None, None, 2), Placement(1.0, "cpu", 2)),
    "a spare card": (("auto", None, 1, 2), Placement(1.0, "cuda:1", 1)),
    "four on a card": (("auto", 0.25, 4, 2), Placement(0.25, "cuda:1", 1)),
    "five on two cards": (("auto", 0.25, 5, 2), Placement(0.25, "cpu", 2)),
    "two cards a worker": (("auto", 2.0, 1, 3), Placement(2.0, "cuda:2", 2)),
    "CPUs asked for": (("cpu", None, None, 2), Placement(0.0, "cpu")),
    "workers on CPUs": (("auto", 0.0, None, 2), Placement(0.0, "cuda:0", 0)),
    "a card asked for": (("cuda", None, None, 1), Placement(1.0, "cuda", 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_workers_follow_the_cards_and_the_driver_takes_a_spare_one(name: str) -> None:
    (device, share, workers, cards), wanted = CASES[name]
    assert place(device, share, workers, cards, own=True) == wanted


def test_in_a_cluster_nobody_knows_of_a_spare_card() -> None:
    assert place("auto", None, 1, 8, own=False) == Placement(1.0, "cpu")


@given(st.integers(0, 8), st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.4, 0.5, 1.0, 2.0])), st.one_of(st.none(), st.integers(1, 20)))
def test_no_card_serves_two_unless_asked(cards: int, share: float | None, workers: int | None) -> None:
    placed = place("auto", share, workers, cards, own=True)
    if share is None:
        assert placed.share == (1.0 if cards else 0.0)
    if placed.driver != "cpu":
        spare = int(placed.driver.removeprefix("cuda:"))
        assert placed.cards == spare < cards  # it is one that Ray does not hand out
        assert not placed.share or workers is not None
        assert not placed.share or most_workers(placed.share, spare) >= (workers or 0)


@given(st.sampled_from([0.1, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0, 3.0]), st.integers(0, 8))
def test_as_many_workers_fit_as_a_slow_count_finds(share: float, cards: int) -> None:
    free, fit = [1.0] * cards, 0
    while True:
        wholes = [i for i, left in enumerate(free) if left >= min(share, 1.0) - 1e-9][: max(1, int(share))]
        if len(wholes) < max(1, int(share)):
            break
        for i in wholes:
            free[i] -= min(share, 1.0)
        fit += 1
    assert most_workers(share, cards) == fit


def test_workers_are_as_many_as_cpus_and_cards_hold() -> None:
    held = {"CPU": 16.0, "GPU": 2.0, "memory": 1e9}
    assert [fitting(None, 1.0, share, held) for share in (0.0, 1.0, 0.4)] == [16, 2, 4]
    with pytest.raises(UserError, match=r"3 workers with runtime\.cpus=1, runtime\.gpus=1 each do not fit \(16 CPUs, 2 GPUs\); lower"):
        fitting(3, 1.0, 1.0, held)


@pytest.mark.parametrize(
    ("placement", "size", "own", "seat"),
    [
        (Placement(0.0, "cpu"), 4, True, Seat("cpu", 4)),
        (Placement(1.0, "cpu", 2), 2, True, Seat("cuda:0", 1)),
        (Placement(2.0, "cuda:2", 2), 1, True, Seat("cuda:0", 1)),
        (Placement(0.25, "cuda:1", 1), 3, True, Seat("cuda:0", 3)),
        (Placement(0.25, "cpu", 2), 8, True, Seat("cuda:0", 4)),
        (Placement(1.0, "cpu"), 8, False, Seat("cpu", 1)),
    ],
)
def test_a_worker_shares_memory_with_those_of_its_card_or_of_its_machine(placement: Placement, size: int, own: bool, seat: Seat) -> None:
    assert placement.seat(size, own=own) == seat


def test_a_run_says_where_it_computes_if_cards_are_in_play() -> None:
    assert Placement(0.0, "cpu").remark(4) == ""
    assert Placement(0.25, "cuda:1", 1).remark(3) == "3 workers with 0.25 of a GPU each; the server computes on cuda:1"
    assert Placement(0.0, "cuda:0", 0).remark(1) == "1 worker on CPUs; the server computes on cuda:0"


MISTAKES = {
    r"runtime\.gpus=1\.5 is out of range; it must be in \[0, 1\], or a whole number": ["runtime.gpus=1.5"],
    r"device=cuda with runtime\.gpus=0: workers that reserve no GPU see none": ["runtime=ray", "device=cuda", "runtime.gpus=0"],
    r"device=cuda:1 with runtime=ray: each worker sees the GPU that Ray gives it": ["runtime=ray", "device=cuda:1"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_no_worker_can_have_is_refused(message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(MISTAKES[message])
