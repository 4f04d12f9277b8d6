"""What a runtime can begin beside the imports, which take most of the seconds until a run's first round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


def begin(overrides: Sequence[str]) -> None:
    """Begin what overrides ask for plainly: to compose them takes the imports. Whoever needs it waits for it, and is told if it failed."""
    for text in overrides:
        if text in EARLY:
            EARLY[text](overrides)


def _ray(overrides: Sequence[str]) -> None:
    from fedsb.runtime.cluster import start_early

    # A cluster elsewhere is joined, and another launcher's jobs start Ray in processes of their own.
    if not any(text.startswith(("runtime.address=", "hydra/launcher=")) for text in overrides):
        start_early()


EARLY: Mapping[str, Callable[[Sequence[str]], None]] = {"runtime=ray": _ray}
