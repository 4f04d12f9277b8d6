"""ABBA whose factors learn in turns, one a round: ΔW is linear in each of the four. B2 begins, without which no other has a gradient."""

from fedsb.adapters.families.abba import abba
from fedsb.adapters.spec import Role

SPEC = abba(
    "abba_alternating",
    (
        Role("B1", learns=2, down="log"),
        Role("A1", learns=3, down="log"),
        Role("B2", learns=0, down="log"),
        Role("A2", learns=1, down="log"),
    ),
)
