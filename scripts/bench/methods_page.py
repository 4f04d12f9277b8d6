"""docs/methods.md out of the runs that ``methods.py`` has kept: ``python scripts/bench/methods_page.py docs/methods.json docs/methods.md``.

Every figure and both plots of a table are those that ``fedsb report`` gives of the same runs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from suite.contestants import REFERENCE
from suite.kept import Kept, at_clients, groups_of, kept, served
from suite.page import HEADS, LEAD, TARGET, TUNED
from suite.plan import Cache
from suite.sections import answers_text, chosen_text, edges_text, far_text, made_text, pairs_text

from fedsb.report.budgets import budgets_text, clients_text
from fedsb.report.groups import Group
from fedsb.report.method_plots import draw_differences, draw_until
from fedsb.report.methods import differences_text, until_text
from fedsb.report.pairing import against_reference
from fedsb.report.sanity import Table, remarks

METRIC = "accuracy"
NAMED = (REFERENCE, "fed_sb", "ravan", "lora_xs")  # have a colour in the plots wherever they stand


def main() -> None:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    cache = Cache(options.cache)
    tables = {place: kept(cache, *place) for place in HEADS}
    parts = [section for place, held in tables.items() for section in sections(held, cache.truths, HEADS[place], options.page)]
    missing = sum(held.planned - held.own for held in tables.values())
    told = f"**{missing} of {sum(held.planned for held in tables.values())} runs are missing yet.**" if missing else ""
    options.page.write_text("\n\n".join(filter(None, [LEAD, told, *parts])) + "\n", encoding="utf-8")


def sections(held: Kept, truths: Mapping[str, str], head: str, page: Path) -> Iterator[str]:
    """Yield the parts of a table; none where no run of its reference is kept."""
    if REFERENCE not in held.cells:
        return
    with tempfile.TemporaryDirectory() as scratch:
        groups = groups_of(held, truths, Path(scratch))
    plain = f"{page.stem}-{held.key.replace('/', '-')}"
    yield f"## {head}"
    yield f"{held.own} of {held.planned} runs are in."
    yield answers_text(held, groups, METRIC)
    yield far_text(held)
    yield from _measured(served(groups), groups[REFERENCE], page.with_name(plain))
    yield pairs_text(held, groups, METRIC)
    yield clients_text(at_clients(groups), METRIC)
    yield edges_text(held)
    yield chosen_text(held)
    yield made_text(held)


def _measured(groups: list[Group], reference: Group, plain: Path) -> Iterator[str]:
    """Yield what ``fedsb report`` says of the groups, and draw its plots into files whose names begin with ``plain``."""
    rows, target = against_reference(groups, METRIC, REFERENCE), reference.mean(METRIC)
    plots = [plain.with_name(f"{plain.name}-{what}.png") for what in ("differences", "bytes")]
    draw_differences(plots[0], rows, METRIC)
    draw_until(plots[1], groups, METRIC, target, named=NAMED)
    yield differences_text(rows, METRIC)
    yield f"![differences]({plots[0].name})"
    yield "\n".join(f"- {line}" for line in remarks(Table(groups, METRIC, TUNED)))
    yield f"{TARGET} {until_text(groups, METRIC, target, chosen=False)}"
    yield f"![accuracy against bytes]({plots[1].name})"
    yield budgets_text(groups)


if __name__ == "__main__":
    main()
