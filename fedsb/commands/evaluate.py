"""``fedsb eval``: the model of a run, or an exported one, measured again beside its untouched base."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsb.commands.flags import with_values
from fedsb.core.errors import UserError


@dataclass
class Asked:
    """What was given: the folder, changes to its configuration, and flags with their values."""

    folder: Path
    changes: list[str] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)


def evaluate(arguments: Sequence[str]) -> int:
    """Measure, and print a table; or hand the model over to lm-eval."""
    from rich.console import Console

    from fedsb.app.measuring.evaluating import evaluation
    from fedsb.report.counting import Count
    from fedsb.report.evaluation import print_evaluation

    asked = read(arguments)
    if "--lm-eval" in asked.flags:
        from fedsb.app.measuring.lm_eval import harness

        print(harness(asked.folder, asked.flags["--lm-eval"]))
        return 0
    tasks = asked.flags["--tasks"].split(",") if "--tasks" in asked.flags else None
    with Count(Console(stderr=True)) as counts:
        found = evaluation(asked.folder, asked.changes, tasks, counts.beginning)
    for remark in found.remarks:
        print(remark, file=sys.stderr)
    print_evaluation(found.rows, found.names)
    if "--answers" in asked.flags:
        Path(asked.flags["--answers"]).write_text("".join(line + "\n" for line in found.answers), encoding="utf-8")
    return 0


def read(arguments: Sequence[str]) -> Asked:
    """Sort arguments into the folder, ``KEY=VALUE`` and flags, whose values follow them or stand behind ``=``.

    Raises:
        UserError: no folder, two, one that is not there, or a flag that nobody knows or that has no value.
    """
    others, flags = with_values("eval", arguments)
    changes = [each for each in others if "=" in each and not Path(each).exists()]
    folders = [each for each in others if each not in changes]
    if len(folders) != 1:
        raise UserError(f"fedsb eval takes the folder of one run or model, and {len(folders)} are given: fedsb eval outputs/…")
    if not Path(folders[0]).is_dir():
        raise UserError(f"'{folders[0]}' is no folder; give the output folder of a run, or that of an exported model")
    if "--max-examples" in flags:
        changes.append(f"eval.max_examples={flags['--max-examples']}")
    return Asked(Path(folders[0]), changes, flags)
