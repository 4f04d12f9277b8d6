"""The picture of a partition: clients by labels, each share a shade, from what summaries hold of runs that may tell it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedsb.report.clients import MOST_CLIENTS
from fedsb.report.page.view import View, ranges_text
from fedsb.report.table import plural
from fedsb.run.folder import Run

MOST_LABELS = 40
MOST_PICTURES = 12
UNTOLD = (
    "No run says how its examples are dealt out: one under privacy does not, for sizes and labels are what it protects, nor does one over "
    "real nodes."
)
SHADES = (
    "Share of each label, or of each group that examples are dealt by, among a client's examples; the darker, the larger. Skew: 0 all "
    "alike, 1 each its own."
)


def skew_html(view: View) -> str:
    """Return a picture a partition, the first one open: runs of one seed share theirs."""
    found: dict[str, tuple[Mapping[str, Any], list[Run]]] = {}
    for run in view.comparison.runs:
        partition = (run.summary or {}).get("partition")
        if partition and partition.get("sizes"):
            found.setdefault(json.dumps(partition, sort_keys=True), (partition, []))[1].append(run)
    if not found:
        return f"<p>{UNTOLD}</p>"
    pictures = [_picture(view, partition, runs, opened=i == 0) for i, (partition, runs) in enumerate(list(found.values())[:MOST_PICTURES])]
    rest = len(found) - MOST_PICTURES
    return "".join([f"<p>{SHADES}</p>", *pictures, f"<p>and {plural(rest, 'other partition')}</p>" if rest > 0 else ""])


def _picture(view: View, partition: Mapping[str, Any], runs: Sequence[Run], *, opened: bool) -> str:
    sizes = partition["sizes"]
    seeds = ranges_text(seed for run in runs if isinstance(seed := run.setting("seed"), int))
    figures = {"label": partition["label_skew"], str(partition.get("dealt_by")): partition.get("group_skew")}
    skew = "".join(f", {kind} skew {figure:.2f}" for kind, figure in figures.items() if figure is not None)
    if partition.get("dealt_by") == "quantity" and partition.get("size_skew") is not None:
        skew += f", size skew {partition['size_skew']:.2f}"
    numbers = ranges_text(view.numbers[run.path] for run in runs)
    said = f"Seed {seeds or '–'}: {plural(len(sizes), 'client')}, {sum(sizes.values()):,} examples{skew}. From runs {numbers}."
    return f"<details{' open' if opened else ''}><summary>{escape(said)}</summary>{_grid(partition, said)}</details>"


def _grid(partition: Mapping[str, Any], said: str) -> str:
    grouped = bool(partition.get("groups"))  # what it is dealt by is what there is to see
    sizes, shares = partition["sizes"], partition["group_shares" if grouped else "label_shares"]
    named = partition["groups" if grouped else "labels"]
    labels = named[:MOST_LABELS]
    most = max(sizes.values())
    heads = "".join(f'<th scope="col" title="{escape(label)}"><span>{escape(label)}</span></th>' for label in labels)
    rows = [_row(client, sizes[client], most, shares.get(client, ())[: len(labels)], labels) for client in list(sizes)[:MOST_CLIENTS]]
    rest = [
        f"{plural(len(sizes) - MOST_CLIENTS, 'more client')}" if len(sizes) > MOST_CLIENTS else "",
        f"{plural(len(named) - MOST_LABELS, 'more column')}" if len(named) > MOST_LABELS else "",
    ]
    left_out = ", ".join(filter(None, rest))
    wide = " many" if len(labels) > 12 else ""
    below = f"<p>and {left_out}</p>" if left_out else ""
    return (
        f'<table class="heat{wide}"><caption class="unseen">{escape(said)}</caption><thead><tr><th scope="col">client</th>'
        f'<th scope="col">examples</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>{below}'
    )


def _row(client: str, size: int, most: int, shares: Sequence[float], labels: Sequence[str]) -> str:
    cells = "".join(
        f'<td style="--share:{share:.3g}" title="{escape(f"{client}, {label}: {share:.1%}, {round(share * size):,} of {size:,}")}">'
        f"<span>{share:.0%}</span></td>"
        for label, share in zip(labels, shares, strict=False)
    )
    return f'<tr><th scope="row">{escape(client)}</th><td class="size" style="--size:{size / most:.3g}">{size:,}</td>{cells}</tr>'
