"""``fedsb export``: the model of a finished run for others to load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedsb.commands.flags import with_values
from fedsb.core.collector import uncollected
from fedsb.core.errors import UserError

MOST = 2


def export(arguments: Sequence[str]) -> int:
    """Write the model, say where it lies, and what whoever loads it has to know."""
    folders, flags = with_values("export", arguments)
    if not folders:
        raise UserError("fedsb export needs the folder of a run: fedsb export outputs/… [OUT]")
    if len(folders) > MOST:
        raise UserError(f"fedsb export takes {MOST} arguments at most, and '{folders[MOST]}' is one more; see fedsb export --help")
    with uncollected(for_good=True):
        from fedsb.app.exports.on_request import export as write

    where = Path(folders[1]) if len(folders) == MOST else None
    out, remarks = write(Path(folders[0]), where, form=flags.get("--format", "merged"), dtype=flags.get("--dtype"))
    print(out)
    for remark in remarks:
        print(remark, file=sys.stderr)
    return 0
