"""How a command ends: its exit status, and one line where it could not do what it was asked."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fedsb.errors import RunError, UserError

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


def guarded(action: Callable[[], int]) -> int:
    """Turn a user's mistake into one line and exit status 2, a failed run into one line and 1."""
    try:
        return action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except RunError as error:
        print(f"error: the run stopped: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
