"""Old names lead to the modules that they were, and to no second copy of them."""

from __future__ import annotations

import importlib

import pytest

from fedsb.core.moved import MOVED, NAMES


@pytest.mark.parametrize("name", MOVED)
def test_an_old_name_is_the_module_under_its_new_one(name: str) -> None:
    old, new = importlib.import_module(name), importlib.import_module(MOVED[name])
    assert old is new
    assert new.__spec__ is not None
    assert (new.__name__, new.__spec__.name) == (MOVED[name], MOVED[name])


def test_what_has_left_a_module_since_is_found_in_its_old_one() -> None:
    for name, others in NAMES.items():
        module = importlib.import_module(name)
        assert all(getattr(module, each) is getattr(importlib.import_module(home), each) for each, home in others.items())
