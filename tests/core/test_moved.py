"""Old names lead to the modules that they were, and to no second copy of them."""

from __future__ import annotations

import importlib

import pytest

from fedsb.core.moved import MOVED


@pytest.mark.parametrize("name", MOVED)
def test_an_old_name_is_the_module_under_its_new_one(name: str) -> None:
    old, new = importlib.import_module(name), importlib.import_module(MOVED[name])
    assert old is new
    assert new.__spec__ is not None
    assert (new.__name__, new.__spec__.name) == (MOVED[name], MOVED[name])
