"""Standard output and error on machines as they are: another encoding than UTF-8, or nobody who reads."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress

from fedsb.core.disk import reason_of

UNREAD = 141  # as of a process that SIGPIPE ends
SPELLINGS = {"…": "...", "’": "'", "−": "-", "–": "-", "×": "x", "·": "*"}


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Write what an encoding lacks in characters that all have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SPELLINGS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


codecs.register_error("fedsb.spelled", _spelled)


def spell_out() -> None:
    """Let no character end a run that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="fedsb.spelled")


def hand_on(status: int) -> int:
    """Write out what is held back, and return a command's exit status: another one where it was 0 and that is not possible."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        fall_silent()
        return status or UNREAD
    except OSError as error:
        fall_silent()
        print(f"error: {reason_of(error)}", file=sys.stderr)
        return status or 1
    return status


def fall_silent() -> None:
    """Send standard output to nowhere: the interpreter flushes it once more at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
