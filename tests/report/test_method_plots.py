"""Plots of many methods: who has a colour, and what stands at the edge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.report import method_plots
from fedsb.report.groups import grouped
from fedsb.report.method_plots import CROWD, ahead, draw_differences, draw_until
from fedsb.report.pairing import Compared
from fedsb.report.resampling import Difference
from fedsb.report.until import Point
from fedsb.run.folder import read_run
from tests.report.made import Maker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return the figures that were saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(method_plots, "save", lambda figure, path: figures.append(figure) or path)
    return figures


@given(st.dictionaries(st.sampled_from("abcdef"), POINTS, min_size=1), st.sampled_from(["accuracy", "loss"]))
def test_ahead_is_whose_point_no_other_matches_with_fewer_bytes(curves: dict[str, list[tuple[int, int]]], metric: str) -> None:
    better = (lambda one, other: one < other) if metric == "loss" else (lambda one, other: one > other)
    points = [(label, *point) for label, curve in curves.items() for point in curve]
    first = {
        label
        for label, cost, value in points
        if all(better(value, v) for _, c, v in points if c < cost) and not any(better(v, value) for _, c, v in points if c == cost)
    }
    found = ahead({label: [Point(1, cost, 0, value) for cost, value in curve] for label, curve in curves.items()}, metric)
    assert {*found} <= first
    assert {(c, v) for label, c, v in points if label in first} & {(c, v) for label, c, v in points if label in found}
    best = (min if metric == "loss" else max)(value for _, _, value in points)
    assert any(value == best for label, _, value in points if label in found)


def test_of_a_crowd_those_alone_have_colours_that_are_ahead_or_asked_for(tmp_path: Path, make_run: Maker, drawn: list[Figure]) -> None:
    runs = [read_run(make_run(f"r{rank}", "fedavg_lora", rank=rank)) for rank in range(2, CROWD + 5)]
    groups = grouped(runs)
    assert draw_until(tmp_path / "plot.png", groups, "accuracy", None, named=[groups[5].label])
    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    told = [label for label in lines if str(label) in {group.label for group in groups}]
    assert groups[5].label in told
    assert 1 < len(told) < CROWD
    assert f"{len(groups) - len(told)} others, nowhere ahead" in lines


def test_what_is_far_out_stands_at_the_edge_with_its_value(tmp_path: Path, drawn: list[Figure]) -> None:
    near = [Difference(0.01 * i, (0.01 * i - 0.02, 0.01 * i + 0.02), 0.01, seeds=3) for i in range(-3, 4)]
    found = [*near, Difference(-0.7, (-0.8, -0.6), 0.01, seeds=3)]
    rows = [_row(f"m{i}", each) for i, each in enumerate(found)]
    assert draw_differences(tmp_path / "plot.png", rows, "accuracy")
    [axes] = drawn[0].axes
    assert [text.get_text().strip() for text in axes.texts] == ["-0.700"]
    assert axes.get_xlim()[0] > -0.3
    drawn.clear()
    assert draw_differences(tmp_path / "plot.png", rows[:-1], "accuracy")
    assert not drawn[0].axes[0].texts


def _row(label: str, found: Difference) -> Any:
    group: Any = type("Named", (), {"label": label})()
    return Compared(group, None, found)
