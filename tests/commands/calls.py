"""What the tests of commands share: a command's call, the log that it takes over, and the one line of a mistake."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Call = Callable[..., tuple[int, str, str]]


@contextmanager
def handlers_given_back() -> Iterator[None]:
    """Give back the handlers of the log and the filters of warnings that a command takes over."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    with warnings.catch_warnings():
        yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    for handler in [handler for handler in handlers if handler not in root.handlers]:
        root.addHandler(handler)


def first_line(text: str) -> str:
    """Return the only line of an error message."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    return lines[0]
