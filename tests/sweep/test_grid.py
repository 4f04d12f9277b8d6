"""Grids under conditions, and points that are drawn: held against products that are written out."""

from __future__ import annotations

import itertools
import math

import pytest

from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.sweep.grid import resolved


def jobs(overrides: list[str], *own: str) -> list[set[str]]:
    return [set(job.overrides) for job in resolved(overrides, load(own).sweep)]


RATES = "sweep.grid=[['method=a,b','train.lr=1,2'],['method=c','train.lr=3']]"
LAID = [
    {"method=a", "train.lr=1"},
    {"method=a", "train.lr=2"},
    {"method=b", "train.lr=1"},
    {"method=b", "train.lr=2"},
    {"method=c", "train.lr=3"},
]


def test_a_condition_gives_a_key_other_values() -> None:
    assert jobs([], RATES) == LAID
    assert jobs(["seed=0,1"], RATES) == [point | {f"seed={seed}"} for point, seed in itertools.product(LAID, (0, 1))]


def test_a_command_line_chooses_of_the_grid() -> None:
    assert jobs(["method=a,c"], RATES) == [point for point in LAID if "method=b" not in point]
    assert jobs(["method=a", "train.lr=2", "seed=0,1"], RATES) == [{"method=a", "train.lr=2", f"seed={seed}"} for seed in (0, 1)]
    with pytest.raises(UserError, match=r"^the grid of the sweep has nothing for method=d; leave that out"):
        jobs(["method=a,d"], RATES)


def test_the_rates_that_are_there_lie_around_each_methods_own() -> None:
    found = resolved(["seed=0"], load(["sweep=rates"]).sweep)
    assert len(found) == 30
    for job in found:
        config = load(list(job.overrides))
        assert config.method.lr / 4 < config.train.lr < config.method.lr * 4


DRAWN = ["train.lr=tag(log,interval(1e-4,1e-2))", "rank=shuffle(4,8,16)", "train.momentum=interval(0,0.9)", "x=int(interval(1,3))"]


def test_points_are_drawn_together_and_meet_the_rest_of_the_grid() -> None:
    found = jobs([*DRAWN, "seed=0,1"], "sweep.samples=40", "sweep.seed=3")
    assert len(found) == 80
    assert found == jobs([*DRAWN, "seed=0,1"], "sweep.samples=40", "sweep.seed=3")
    assert found != jobs([*DRAWN, "seed=0,1"], "sweep.samples=40", "sweep.seed=4")
    assert [job - {"seed=0"} for job in found[:40]] == [job - {"seed=1"} for job in found[40:]]
    values = [dict(text.split("=") for text in job) for job in found]
    assert {v["rank"] for v in values} == {"4", "8", "16"}
    assert {v["x"] for v in values} == {"1", "2", "3"}
    assert all(0 <= float(v["train.momentum"]) <= 0.9 for v in values)
    rates = sorted(math.log10(float(v["train.lr"])) for v in values)
    assert -4 <= rates[0] < -3.5
    assert -2.5 < rates[-1] <= -2
    assert -3.4 < sum(rates) / len(rates) < -2.6  # about the middle of the logarithms, where a plain draw has -2.4


def test_another_key_changes_no_draws() -> None:
    alone = jobs(DRAWN[:1], "sweep.samples=5")
    assert [{text for text in job if text.startswith("train.lr")} for job in jobs(DRAWN[:2], "sweep.samples=5")] == alone


@pytest.mark.parametrize(
    ("overrides", "own", "line"),
    [
        (["rank=interval(1,2)"], [], r"^'rank=interval\(1,2\)' is to be drawn from: add sweep.samples=N"),
        (["train.lr=tag(log,interval(0,1))"], ["sweep.samples=2"], "is drawn by its logarithm, and must begin above 0"),
        (["seed=range(0,200)", "rank=range(1,101)"], [], "the grid has 20,000 jobs"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(overrides: list[str], own: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        jobs(overrides, *own)
