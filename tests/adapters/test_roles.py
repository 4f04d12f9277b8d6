"""The life of a role is a table, and a table that no run can lead is refused where it is written."""

from __future__ import annotations

from typing import Any

import pytest

from fedsb.adapters.spec import AdapterSpec, Role
from fedsb.adapters.starts import cored
from fedsb.core.state import HEAD

NOBODYS = Role("A", down="nothing", kept_by="nobody")


@pytest.mark.parametrize(
    ("role", "said"),
    [
        (Role("B", down="nothing"), "is kept by server and comes down in nothing"),
        (Role("B", kept_by="client", up=False), "is kept by client and comes down in state"),
        (Role("B", down="log", kept_by="nobody"), "is kept by nobody and comes down in log"),
        (Role("B", up=False), "learns, is kept by the server, and does not go up"),
        (Role("B", learns=1, down="nothing", up=False, kept_by="client"), "goes up or learns in turns"),
        (Role("B", down="nothing", kept_by="client"), "goes up or learns in turns"),
        (Role("B", down="start"), "is made by everybody at the start, and learns"),
        (Role("B", learns=0, down="start"), "is made by everybody at the start, and learns"),
        (Role("B", learns="never", down="start", kept_by="client", up=False), "is kept by client and comes down in start"),
    ],
)
def test_a_life_that_loses_something_is_refused(role: Role, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^family 'odd': B .*{said}"):
        AdapterSpec("odd", (role, NOBODYS))


@pytest.mark.parametrize(
    "head",
    [
        Role(HEAD, learns=0),
        Role(HEAD, down="log"),
        Role(HEAD, down="nothing", kept_by="nobody"),
        Role(HEAD, up=lambda trained: trained[HEAD]),
    ],
)
def test_so_is_a_head_that_rests_or_is_folded(head: Role) -> None:
    with pytest.raises(ValueError, match=r"^family 'odd': the head learns in every round"):
        AdapterSpec("odd", head=head)


def test_what_everybody_makes_is_made_of_no_gradient() -> None:
    with pytest.raises(ValueError, match=r"^family 'odd': everybody makes B, and a start takes a gradient, which nobody has alone$"):
        AdapterSpec("odd", (Role("B", learns="never", down="start"),), {"gradient": None}, from_gradient=cored)


@pytest.mark.parametrize("given", [{"starts": {"gradient": None}}, {"from_gradient": cored}])
def test_a_start_from_a_gradient_is_whole_or_not_there(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^family 'odd': a start that takes a gradient"):
        AdapterSpec("odd", **given)
