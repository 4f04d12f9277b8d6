"""The log of a run, in its folder, whatever runtime it runs under."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import NamedTuple

# Whether people read standard output: under Flower they do, though it comes through a pipe.
_TO_PEOPLE: ContextVar[bool] = ContextVar("to_people", default=True)
HUB_LOGGERS = ("huggingface_hub", "datasets")  # they tell of each retry, twice
PACKAGES = ("fedsb", "strategies", "clients")


NODE_LOG = 2**24  # bytes of a node's log, before it is put aside
LONGEST = 4000  # characters of a line that somebody else has a part in


def printable(text: str) -> str:
    """Return somebody else's words as one line of a log, which they can neither break nor fill."""
    shown = "".join(c if c.isprintable() else " " for c in text[: LONGEST + 1])
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} …"


def last_line(text: str | None) -> str:
    """Return the last line of a traceback, or of what else was told, that says something; at most 300 characters."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


@contextmanager
def speaking_to(*, people: bool) -> Iterator[None]:
    """Say who reads standard output while the block runs."""
    before = _TO_PEOPLE.set(people)
    try:
        yield
    finally:
        _TO_PEOPLE.reset(before)


def speech(progress: str) -> str:
    """Return how a run's progress is shown: ``lines`` or ``json``; ``auto`` goes by who reads."""
    return ("lines" if _TO_PEOPLE.get() else "json") if progress == "auto" else progress


def say_early(line: str, *, progress: str) -> None:
    """Print a line before there is anything that shows a run."""
    print(json.dumps({"remark": line}) if speech(progress) == "json" else line, flush=True)


TIMELESS = "%(levelname)s %(message)s"
FORMAT = f"%(asctime)s {TIMELESS}"
IN_FILE_ALONE = {"in_file_alone": True}  # `extra` of a record that people see otherwise


class _Screen(logging.Handler):
    """Writes to standard error as it is at that moment: while a bar is shown, what is written there goes above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class RunLog(logging.FileHandler):
    """A file that may be on a full disk: what the run itself can't write there ends it, and its log need not tell that twice."""

    def leave_times_out(self) -> None:
        """Write no times from now on: those of a private client's replies may tell of its data."""
        self.setFormatter(logging.Formatter(TIMELESS))

    def handleError(self, record: logging.LogRecord) -> None:
        """Do without the record."""

    def close(self) -> None:
        """Close the file; what can't be written any more is lost."""
        with suppress(OSError):
            super().close()


def log_to_screen() -> None:
    """Send warnings to standard error; the run's folder has the whole log."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    screen = _Screen(logging.WARNING)
    screen.setFormatter(logging.Formatter(FORMAT))
    screen.addFilter(lambda record: not getattr(record, "in_file_alone", False))
    root.addHandler(screen)


class EarlyLines(logging.Handler):
    """Keeps what is logged before a run has a log, until there is one."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[logging.LogRecord] | None = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        if self._kept is not None:
            self._kept.append(record)

    def hand_on(self, log: logging.Handler) -> None:
        """Write into a log, once, what was kept; what comes from now on goes there by itself."""
        kept, self._kept = self._kept or [], None
        for record in kept:
            log.handle(record)


@contextmanager
def early_lines(level: str) -> Iterator[EarlyLines]:
    """Keep what the project's packages log, from a level on, while the block runs, until it is handed on."""
    handler = EarlyLines()
    with _handling(handler), speaking_from(logging.getLevelNamesMapping()[level.upper()], *PACKAGES):
        yield handler


@contextmanager
def run_log(path: Path, level: str = "info", early: EarlyLines | None = None) -> Iterator[RunLog]:
    """Append what the project's packages log, from a level on, to ``path`` while the block runs, and before it what was kept earlier."""
    handler = RunLog(path, encoding="utf-8", errors="backslashreplace")
    with _handling(handler), speaking_from(logging.getLevelNamesMapping()[level.upper()], *PACKAGES):
        if early:
            early.hand_on(handler)
        yield handler


@contextmanager
def node_log(path: Path) -> Iterator[None]:
    """Append what the project's packages warn of to ``path``, and show it on standard error, while the block runs.

    Nobody else does on a real node: Opacus and Flower leave the root logger without a voice. A file that cannot be written is done without.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(RotatingFileHandler(path, maxBytes=NODE_LOG, backupCount=3, encoding="utf-8", errors="backslashreplace"))
        path.chmod(0o600)  # its lines hold rows of the data
    with _handling(*handlers):
        yield


MOST_LINES = 200  # that one answer of a worker brings along


class Line(NamedTuple):
    """A line of another process's log: who wrote it, its level, and its text, a traceback included."""

    logger: str
    level: int
    text: str


class _Gathering(logging.Handler):
    def __init__(self, lines: list[Line]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) < MOST_LINES:
            self._lines.append(Line(record.name, record.levelno, logging.Formatter("%(message)s").format(record)))


@contextmanager
def overheard(level: int) -> Iterator[list[Line]]:
    """Gather what the project's packages log while the block runs, from a level on, for a process that keeps the run's log."""
    lines: list[Line] = []
    with _handling(_Gathering(lines)), speaking_from(level, *PACKAGES):
        yield lines


def retell(lines: Iterable[Line], who: str) -> None:
    """Log what another process has logged, with the name of whom it worked for."""
    for line in lines:
        logging.getLogger(line.logger).log(line.level, "%s: %s", who, line.text)


@contextmanager
def _handling(*handlers: logging.Handler) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in PACKAGES]
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
        for logger in loggers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()


@contextmanager
def speaking_from(level: int, *names: str) -> Iterator[None]:
    """Let loggers of these names speak from a level on while the block runs."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, each in zip(loggers, before, strict=True):
            logger.setLevel(each)
