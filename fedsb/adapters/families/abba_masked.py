"""ABBA whose first pair stays as it started: ``ΔW = s M ∘ (B2 A2)`` with ``M = B1 A1``, linear in the product of the second pair."""

from fedsb.adapters.families.abba import abba
from fedsb.adapters.spec import NEVER, Role

SPEC = abba(
    "abba_masked",
    (Role("B1", learns=NEVER, down="log"), Role("A1", learns=NEVER, down="log"), Role("B2"), Role("A2")),
    mask=("B1", "A1"),
)
