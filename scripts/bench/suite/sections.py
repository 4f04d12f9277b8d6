"""The sections of a table that ``fedsb report`` has not: the pairs that were asked about, and what was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from fedsb.report.groups import Group
from fedsb.report.markdown import table
from fedsb.report.methods import difference_text
from fedsb.report.pairing import Compared, compared
from fedsb.report.resampling import Difference
from fedsb.report.table import gap_text

from .contestants import CONTESTANTS, REFERENCE
from .kept import FAR, Kept

# What is asked of Fed-SB: against its rivals, and what its start from the clients' gradients is worth.
ASKED = (
    ("fed_sb", "ravan"),
    ("fed_sb", "lora_xs"),
    ("fed_sb", "fed_sb, orthogonal"),
    ("fed_sb", "fed_sb, LoRA-One's pair"),
)
PAIRS = (
    "Pairs that were asked about before the runs, by the same bootstrap. `lora_xs` is Fed-SB from the weights' own leading pair "
    "(`weight_svd`); `fed_sb, orthogonal` is Fed-SB from a pair of the seed; exact is whose gap was below 1e-5 in every round."
)


def pairs_text(held: Kept, groups: Mapping[str, Group], metric: str) -> str:
    """Return the table of the pairs that were asked about; empty where none has run."""
    exact = [(name, REFERENCE) for name in held.exact if name != REFERENCE]
    pairs = [(groups[one], groups[other]) for one, other in (*ASKED, *exact) if {one, other} <= groups.keys()]
    body = [row for each in compared(pairs, metric) for row in _pair_row(each)]
    return f"{PAIRS}\n\n{table(['pair', 'seeds', 'difference', 'interval'], body)}" if body else ""


def _pair_row(each: Compared) -> Iterator[list[object]]:
    if each.difference is not None and each.reference is not None:
        found = each.difference
        yield [f"{each.group.label} − {each.reference.label}", found.seeds, difference_text(found), verdict(found)]


def verdict(found: Difference) -> str:
    """Say on which side of zero the whole interval is, of several seeds."""
    if not found.stands_out:
        return "not told apart"
    return "above" if found.value > 0 else "below"


def answers_text(held: Kept, groups: Mapping[str, Group], metric: str) -> str:
    """Answer what was asked of exact methods in one sentence, by who stands out."""
    exact = [(groups[name], groups[REFERENCE]) for name in held.exact if name != REFERENCE and not groups[name].by_clients]
    found = {each.group.label: verdict(each.difference) for each in compared(exact, metric) if each.difference is not None}
    said = [f"{_named(found, side)} {side} FedIT" for side in ("above", "below") if side in found.values()]
    same = sum(side == "not told apart" for side in found.values())
    return f"Of {len(found)} exact contestants {', '.join([*said, f'{same} not told apart from it'])}." if found else ""


def _named(found: Mapping[str, str], side: str) -> str:
    names = [name for name, each in found.items() if each == side]
    return f"{len(names)} ({_list(names)})"


def far_text(held: Kept) -> str:
    """Say who is off the budget; empty where nobody is."""
    far = ", ".join(f"`{name}` ({off:+.0%})" for name, off in held.far.items())
    return f"Off the budget by more than {FAR:.0%}, as no rank comes nearer: {far}." if far else ""


def edges_text(held: Kept) -> str:
    """Say how many contestants took a rate at the grid's edge: for them the grid may end too early."""
    of = [name for name in held.cells if CONTESTANTS[name].rates]
    low, high = ([name for name in of if rate_of(held, name) == CONTESTANTS[name].rates[end]] for end in (0, -1))
    return (
        f"{len(low) + len(high)} of {len(of)} took a rate at the grid's edge, where a better one may lie outside: the least "
        f"{len(low)}{_brackets(low)}, the largest {len(high)}{_brackets(high)}."
    )


def _brackets(names: Sequence[str]) -> str:
    return f" ({_list(names)})" if names else ""


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)  # some hold commas


def rate_of(held: Kept, name: str) -> float:
    """Return the rate with which a contestant ran."""
    return float(held.cells[name][0]["settings"]["train.lr"])


def chosen_text(held: Kept) -> str:
    """Return the table of chosen rates, gaps, gauges and seconds."""
    body = []
    for name, found in held.cells.items():
        gap, gauges = held.gap(name), [cell["gauges"][-1] for cell in found if cell["gauges"][-1] is not None]
        body.append(
            [
                name,
                f"{rate_of(held, name):g}" if CONTESTANTS[name].rates or CONTESTANTS[name].rate_of else "–",
                "–" if gap is None else gap_text(gap),
                f"{fmean(gauges):.3g}" if gauges else "–",
                f"{fmean(cell['cpu_s'] for cell in found):.0f}",
            ]
        )
    return table(["method", "rate chosen", "largest gap of any round", "‖B‖ / ‖A‖ at the end", "CPU s a run"], body)


def made_text(held: Kept) -> str:
    """Say which versions, commits and data the runs of a table were made with."""
    made = [cell["made"] for cells in held.cells.values() for cell in cells]
    versions = dict.fromkeys(f"{name} {version}" for each in made for name, version in each["versions"].items())
    commits = dict.fromkeys(each["commit"] for each in made)
    data = dict.fromkeys(f"`{name}` {digest}" for each in made for name, digest in each["data"].items())
    return f"Made with {', '.join(versions)}, commit {', '.join(commits)}; SHA-256 (its first half) of {', '.join(data)}."
