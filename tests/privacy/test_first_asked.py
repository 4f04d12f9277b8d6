"""A run asks for what it asked first, however many others come between, and whenever a process dies."""

from __future__ import annotations

from pathlib import Path

from fedsb.privacy.first_asked import FILE, asks_as_before


def test_what_was_asked_first_is_kept_for_good_and_by_run(tmp_path: Path) -> None:
    assert asks_as_before(tmp_path, "1/a", "x")
    assert all(asks_as_before(tmp_path, f"{number}/a", "y") for number in range(2, 40))
    assert asks_as_before(tmp_path, "1/a", "x")
    assert not asks_as_before(tmp_path, "1/a", "y")
    assert not asks_as_before(tmp_path, "1/a", "y")
    assert asks_as_before(tmp_path, "1/b", "y")


def test_a_line_that_was_cut_off_says_nothing(tmp_path: Path) -> None:
    asks_as_before(tmp_path, "1/a", "x")
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"run": "2/a", "ask')
    assert asks_as_before(tmp_path, "2/a", "z")
    assert not asks_as_before(tmp_path, "1/a", "z")
    assert not asks_as_before(tmp_path, "2/a", "x")
