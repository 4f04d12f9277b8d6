"""What a runtime can begin beside the imports, which take most of the seconds until a run's first round."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

# What processes hand on to those that they start; what is set already stays.
QUIET = {"TOKENIZERS_PARALLELISM": "false", "FLWR_TELEMETRY_ENABLED": "0"}
# A cluster elsewhere is joined, a resumed run may have one, and another launcher's jobs start Ray in processes of their own.
ELSEWHERE = ("runtime.address=", "resume=", "hydra/launcher=")


def switch_off() -> None:
    """Switch off what libraries fetch or say on their own, here and in the processes that this one starts from now on."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def begin(arguments: Sequence[str]) -> None:
    """Begin what arguments ask for plainly: to compose them takes the imports. Whoever needs it waits for it, and is told if it failed."""
    switch_off()
    if not any(text.lstrip("+~").startswith(ELSEWHERE) for text in arguments):
        for text in arguments:
            if text in EARLY:
                EARLY[text]()


def _ray() -> None:
    from fedsb.runtime.cluster import start_early

    start_early()


EARLY: Mapping[str, Callable[[], None]] = {"runtime=ray": _ray}
