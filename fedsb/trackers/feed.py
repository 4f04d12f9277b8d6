"""Feeds trackers what a run records. One that is not installed, not reachable or breaks is told once, and the run goes on."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol

from fedsb.run.records import RoundRecord

LOG = logging.getLogger(__name__)


class Tracker(Protocol):
    """Another program's record of a run.

    Attributes:
        dates: whether it stamps what it gets with the time, whoever feeds it.
    """

    dates: ClassVar[bool]

    def record(self, record: RoundRecord) -> None:
        """Take a round's numbers; where the record tells no time, neither must this."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Take what the run came to."""

    def close(self, *, whole: bool) -> None:
        """End it; ``whole`` tells whether the run has finished."""


@contextmanager
def _nobody_asked() -> Iterator[None]:
    """Let what would ask a person for a key, and wait for that, find nobody at a terminal."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before


class Feed:
    """What is between a run and its trackers.

    Args:
        makers: of the trackers, by name; each is made in the folder of the run, in place of what an earlier process left of it there.
        folder: of the run.
    """

    def __init__(self, makers: Mapping[str, Callable[[Path], Tracker]], folder: Path) -> None:
        self._makers = makers
        self._folder = folder
        self._trackers: dict[str, Tracker] = {}
        self._whole = False

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.close, whole=self._whole)

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """Open the trackers, and give them the rounds that an earlier process has left."""
        for name in self._makers:
            self._guarded(name, self._open, name)
        for record in records:
            self.record(record)

    def record(self, record: RoundRecord) -> None:
        """Hand a record on, as it stands in ``metrics.jsonl``."""
        if record.wall_s is None:
            self._leave_those_with_clocks()
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.record, record)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Hand on what the run came to."""
        self._whole = True
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.finish, summary)

    def _open(self, name: str) -> None:
        self._trackers[name] = self._makers[name](self._folder)

    def _leave_those_with_clocks(self) -> None:
        for name, tracker in list(self._trackers.items()):
            if tracker.dates:
                LOG.warning("tracker %s stamps all with the time, which may tell of data here: it gets nothing of this run", name)
                self._guarded(name, tracker.close, whole=False)
                self._trackers.pop(name, None)

    def _guarded(self, name: str, action: Callable[..., object], *given: Any, **named: Any) -> None:
        try:
            with warnings.catch_warnings(), _nobody_asked():
                warnings.simplefilter("ignore")
                action(*given, **named)
        except ImportError as error:
            self._left(name, f"is not installed here ({error}): pip install 'fedsb[{name}]'")
        except Exception as error:  # whatever another program's library raises
            self._left(name, f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")

    def _left(self, name: str, why: str) -> None:
        self._trackers.pop(name, None)
        LOG.warning("tracker %s %s; the run goes on without it", name, why)
