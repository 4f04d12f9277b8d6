"""The log of a run, in its folder, whatever runtime it runs under."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("fedsb", "strategies", "clients")


def last_line(text: str | None) -> str:
    """Return the last line of a traceback, or of what else was told, that says something; at most 300 characters."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def say_early(line: str, *, progress: str) -> None:
    """Print a line before there is anything that shows a run: beside standard output where that is for JSON."""
    print(line, flush=True, file=sys.stderr if progress == "json" else sys.stdout)


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Append what the project's packages log, from INFO on, to ``path`` while the block runs."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()
