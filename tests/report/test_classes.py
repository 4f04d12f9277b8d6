"""The classes of a run, as its first lines name them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedsb.report.classes import SHOWN, class_lines


def test_names_that_look_alike_are_seen() -> None:
    first, second = class_lines(("Film", "film", "film ", "sport", "caf\u00e9", "cafe\u0301"))
    assert first == "6 classes: 'Film', 'film', 'film ', 'sport', 'caf\u00e9', 'cafe\u0301'"
    assert second.endswith(": 'Film', 'film', 'film '; 'caf\u00e9', 'cafe\u0301'")
    assert list(class_lines(())) == []


@given(st.lists(st.integers(), unique=True, min_size=2, max_size=60))
def test_the_number_is_told_and_at_most_so_many_names(numbers: list[int]) -> None:
    (line,) = class_lines([f"class {number}" for number in numbers])
    assert line.startswith(f"{len(numbers)} classes: 'class {numbers[0]}', ")
    assert line.count("'class ") == min(len(numbers), SHOWN)
    assert line.endswith(f", and {len(numbers) - SHOWN} more") is (len(numbers) > SHOWN)
