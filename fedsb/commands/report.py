"""``fedsb report``: the report of one run, or the comparison of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fedsb.commands.flags import with_values
from fedsb.core.errors import UserError
from fedsb.core.logs import log_to_screen
from fedsb.report.folders import write_reports
from fedsb.report.methods import Asked


def report(arguments: Sequence[str]) -> int:
    """Write it, and print where it lies.

    Raises:
        UserError: no folder, one that holds no run, or a flag that nobody knows or that does not fit.
    """
    folders, flags = with_values("report", arguments)
    if not folders:
        raise UserError("fedsb report needs the folder of a run: fedsb report outputs/…")
    log_to_screen()  # what is left out is told there too
    asked = Asked(flags.get("--against"), flags.get("--metric"), _number(flags.get("--target")), flags.get("--tuned"))
    for path in write_reports([Path(folder) for folder in folders], flags.get("--out"), asked):
        print(path)
    return 0


def _number(text: str | None) -> float | None:
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise UserError(f"--target {text} is no number; give a value of the metric, as in --target 0.9")
    return value
