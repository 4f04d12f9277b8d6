"""A row at which a library in Rust panics is one that cannot be used: no exception of its kind ends a node's process."""

from __future__ import annotations

from typing import Any

import pytest

from fedsb.data import Examples, PrivateRows
from fedsb.node.own_data import private_features


class PanicException(BaseException):
    """As pyo3 names and derives its own."""


def tokenised(ending: type[BaseException]) -> Any:
    def each(held: Examples) -> list[dict[str, Any]]:
        if "odd" in held.texts:
            raise ending
        return [{"input_ids": [len(text)]} for text in held.texts]

    return each


def test_a_panic_is_its_own_row_s_alone_and_what_ends_a_process_goes_through() -> None:
    rows = PrivateRows(Examples(("a", "odd", "abc")), {})
    found = private_features(rows, 8, tokenised(PanicException), no_target=0.0)
    assert [feature["input_ids"] for feature in found] == [[1], [0], [3]]
    with pytest.raises(KeyboardInterrupt):
        private_features(rows, 8, tokenised(KeyboardInterrupt), no_target=0.0)
