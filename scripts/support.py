"""What each method goes together with, as a table in Markdown read off what refuses: ``python scripts/support.py [--write]``.

The README holds the table, and a test holds the README to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsb.adapters import SPECS, AdapterSpec
from fedsb.config.checks import check
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.config.settings import laid_out
from fedsb.core.errors import UserError
from fedsb.report.markdown import table
from strategies import STRATEGIES
from strategies.combinations import Wanted, check_wanted

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- python scripts/support.py --write -->", "<!-- end of what goes together -->"
YES, NO = "yes", "–"
# With a start that asks no client, and a bound where none follows from the settings.
SECURE: Mapping[str, Mapping[str, Any]] = {
    "federation": {"secure_sum": True, "exactness": False, "secure_bound": 1.0},
    "init": {"evidence": "public"},
    "data": {"public_fraction": 0.05},
}


@dataclass(frozen=True)
class Asked:
    """What a run may ask for beside its method.

    Attributes:
        changes: of the configuration, by group and key, at the method's rank.
        wanted: the same, as strategies are asked.
    """

    changes: Callable[[int], Mapping[str, Mapping[str, Any]]]
    wanted: Wanted


ASKED: Mapping[str, Asked] = {
    "`privacy=example`": Asked(lambda rank: {"privacy": {"unit": "example", "epsilon": 3.0}}, Wanted()),
    "`privacy=client`": Asked(
        lambda rank: {"privacy": {"unit": "client", "epsilon": 8.0}, "federation": {"weighting": "uniform"}}, Wanted(client_unit=True)
    ),
    "`federation.ranks`": Asked(lambda rank: {"federation": {"ranks": [1, rank]}}, Wanted(ranks=(1, 2))),
    "server optimiser": Asked(lambda rank: {}, Wanted(server_optimizer=True)),
    "FedAU": Asked(lambda rank: {"federation": {"weighting": "fedau"}}, Wanted(weighting="fedau")),
    "secure sums": Asked(lambda rank: SECURE, Wanted(secure_sum=True)),
}


def support() -> str:
    """Return the table: a row a method."""
    head = ("method", *ASKED, "one model to export", "needs")
    return table(head, [_row(name) for name in STRATEGIES])


def _row(name: str) -> list[str]:
    config = load([f"method={name}"])
    spec = SPECS[config.method.adapter].having(config.adapter.options)
    answers = [_answer(config, spec, asked) for asked in ASKED.values()]
    rounds = [f"{spec.turns} rounds"] if spec.turns > 1 else []
    needs = ", ".join([*rounds, *(f"`{need}`" for need in config.method.needs)])
    return [f"`{name}`", *answers, YES if spec.has_global_model else NO, needs or NO]


def _answer(config: Config, spec: AdapterSpec, asked: Asked) -> str:
    groups = {group: replace(getattr(config, group), **changes) for group, changes in asked.changes(config.adapter.rank).items()}
    try:
        check(changed := replace(config, **groups))
        laid_out(changed)
        check_wanted(STRATEGIES[config.method.name], spec, asked.wanted, config.method.name)
    except UserError:
        return NO
    return YES


def within(text: str) -> tuple[str, str, str]:
    """Split a text into what stands before, in and behind the table's place."""
    before, rest = text.split(BEGIN)
    here, after = rest.split(END)
    return before, here.strip(), after


def main() -> None:
    """Print the table, or write it into the README."""
    if "--write" not in sys.argv[1:]:
        print(support())
        return
    before, _, after = within(README.read_text(encoding="utf-8"))
    README.write_text(f"{before}{BEGIN}\n{support()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
