"""How a command ends: its exit status, and one line where it could not do what it was asked."""

from __future__ import annotations

import sys
from collections.abc import Callable

from safetensors import SafetensorError

from fedsb.core.disk import reason_of
from fedsb.core.errors import RunError, UserError
from fedsb.core.signals import Terminated, how_ended
from fedsb.core.streams import UNREAD, fall_silent

DONE, FAILED, MISTAKE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def guarded(action: Callable[[], int]) -> int:
    """Turn what ends a command before its time into an exit status and one line, or silence where nobody reads any more."""
    try:
        return action()
    except UserError as error:
        return _said(f"error: {error}", MISTAKE)
    except RunError as error:
        return _said(f"error: the run stopped: {error}", FAILED)
    except KeyboardInterrupt as error:
        return _said(ended_line(error), status_of(error))
    except BrokenPipeError:
        fall_silent()
        return UNREAD
    except (OSError, SafetensorError) as error:
        if not (reason := reason_of(error)):
            raise
        return _said(f"error: {reason}", FAILED)


def status_of(error: KeyboardInterrupt) -> int:
    """Return the exit status of what a signal ended."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def ended_line(error: KeyboardInterrupt) -> str:
    """Say what ended a command, and how to go on where there is something to go on with."""
    return "; ".join([how_ended(error), *getattr(error, "__notes__", ())])


def by_signal(status: int | None) -> bool:
    """Tell whether a status is that of a command which a signal has ended."""
    return status is not None and status > 128


def _said(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status
