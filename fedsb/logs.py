"""The log of a run, in its folder, whatever runtime it runs under."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

# Whether people read standard output: under Flower they do, though it comes through a pipe.
_TO_PEOPLE: ContextVar[bool] = ContextVar("to_people", default=True)
HUB_LOGGERS = ("huggingface_hub", "datasets")  # they tell of each retry, twice
PACKAGES = ("fedsb", "strategies", "clients")


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


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Append what the project's packages log, from INFO on, to ``path`` while the block runs."""
    with _handling(logging.FileHandler(path)), speaking_from(logging.INFO, *PACKAGES):
        yield


@contextmanager
def node_log(path: Path) -> Iterator[None]:
    """Append what the project's packages warn of to ``path``, and show it on standard error, while the block runs.

    Nobody else does on a real node: Opacus and Flower leave the root logger without a voice. A file that cannot be written is done without.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    with _handling(*handlers):
        yield


@contextmanager
def _handling(*handlers: logging.Handler) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in PACKAGES]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
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
