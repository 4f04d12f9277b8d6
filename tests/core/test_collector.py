"""Garbage is left alone inside of the block and looked for again behind the last one, however they lie in each other."""

from __future__ import annotations

import gc
import sys
import threading

import pytest

from fedsb.core.collector import uncollected


def test_the_collector_rests_until_the_last_block_is_left() -> None:
    assert gc.isenabled()
    with uncollected():
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_and_another_thread_leave_it_as_it_was() -> None:
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with uncollected():
            inside.set()
            leave.wait(10)
            seen.append(gc.isenabled())

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(ValueError, match="here"), uncollected():
        raise ValueError("here")
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert seen == [False]
    assert gc.isenabled()


def test_one_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_is_imported_for_good_is_not_looked_through_again_and_what_is_built_is() -> None:
    """Nor is anything put aside where nothing was imported: in a later job of a sweep that would be what the one before has left."""
    before = gc.get_freeze_count()
    try:
        with uncollected(for_good=True):
            pass
        assert gc.get_freeze_count() == before
        with uncollected():
            sys.modules["fedsb_no_such_module"] = sys
        del sys.modules["fedsb_no_such_module"]
        assert gc.get_freeze_count() == before
        with uncollected(for_good=True), uncollected():
            sys.modules["fedsb_no_such_module"] = sys
        assert gc.get_freeze_count() > before
    finally:
        sys.modules.pop("fedsb_no_such_module", None)
        gc.unfreeze()
