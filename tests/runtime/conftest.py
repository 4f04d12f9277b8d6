"""The end of what a file of tests has started."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from fedsb.runtime.pool import close_pools


@pytest.fixture(scope="module")
def ended() -> Iterator[None]:
    """Leave no Ray behind."""
    yield
    close_pools()
    gc.collect()
