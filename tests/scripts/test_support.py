"""The README's table of what goes together is what the code refuses."""

from __future__ import annotations

from scripts.support import README, support, within


def test_the_readme_has_the_table_of_what_goes_together() -> None:
    _, here, _ = within(README.read_text(encoding="utf-8"))
    assert here == support(), "write it anew: python scripts/support.py --write"
