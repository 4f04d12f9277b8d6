"""What each run on a real node's data asked for first, beside their ledger: it was checked and planned, and nothing else is answered."""

from __future__ import annotations

import json
from pathlib import Path

from fedsb.core.disk import append_line, cut_torn, locked

FILE = "asked.jsonl"


def asks_as_before(folder: Path, run: str, asked: str) -> bool:
    """Tell whether a run asks for what it asked first; the first time, that is kept for good.

    Args:
        folder: of the ledger.
        run: names the run, and the client.
        asked: a digest of what it asks for.
    """
    with locked(folder / FILE) as file:
        cut_torn(file)
        file.seek(0)
        for line in file.read().splitlines():
            said = json.loads(line)
            if said["run"] == run:
                return bool(said["asked"] == asked)
        append_line(file, {"run": run, "asked": asked})
    return True
