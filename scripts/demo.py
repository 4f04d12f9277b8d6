"""Run the default federation through Flower, print its rounds and its summary, and leave no process behind.

Usage: python scripts/demo.py [Hydra overrides …]. Exits non-zero if the run failed, which ``flwr run`` by itself does not.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from fedsb.core.streams import spell_out
from fedsb.runtime.connection import FlowerError, RunStatus
from fedsb.runtime.flower import LocalFlower
from fedsb.runtime.staging import stage_app

FAILED, INTERRUPTED = 1, 130


def run(overrides: list[str], folder: Path) -> RunStatus:
    """Run a federation with Flower's state in ``folder`` and return how it ended."""
    # Relative paths in the overrides are the caller's.
    with LocalFlower(folder / "home", folder=Path.cwd()) as flower:
        run_id = flower.submit(stage_app(folder / "app"), overrides)
        return flower.follow(run_id, lambda line: print(line, flush=True))


def main() -> int:
    """Run, and return the exit status."""
    spell_out()
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print((__doc__ or "").strip())
        return os.EX_OK
    signal.signal(signal.SIGTERM, _interrupt)
    print("starting Flower's simulation (some 20 seconds) …", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="fedsb-") as folder:
            status = run(sys.argv[1:], Path(folder))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except FlowerError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    if status.state == "completed":
        return os.EX_OK
    print(f"error: the run {status.state}: {status.details}", file=sys.stderr)
    return FAILED


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
