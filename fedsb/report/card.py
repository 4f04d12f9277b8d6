"""The model card of what is exported: what it is, what it was trained by and on, what is claimed of it; no path and no client's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fedsb.report.markdown import document, or_dash, table
from fedsb.report.privacy import claim_text
from fedsb.report.report import communication_text, exactness_text
from fedsb.report.series import metrics_of, round_of
from fedsb.report.table import metric_text, plural, selected_text
from fedsb.run.folder import Run

Row = tuple[str, str]
# Label, and the settings that are joined after it.
SETTINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("method", ("method.name",)),
    ("rank", ("rank",)),
    ("adapted layers", ("adapter.targets",)),
    ("task", ("data.task",)),
    ("data", ("data.kind",)),
    ("optimiser, rate, batch", ("train.optimizer", "train.lr", "train.batch_size")),
    ("seed", ("seed",)),
)
UNTOLD = "The base's files do not say under which licence they are. Its terms, and those of the data, hold for what was learnt from it."
LICENCE = "The base is under {licence}. Its terms, and those of the data, hold for what was learnt from it."


def card_text(run: Run, *, base: str, hub_id: str | None, licence: str | None, library: str, how: str, remarks: Sequence[str]) -> str:
    """Return the card, with the front matter that hubs read.

    Args:
        run: that has finished.
        base: name of the base model.
        hub_id: by which hubs know it; None where it comes from elsewhere.
        licence: of the base; None where it is not known.
        library: ``transformers`` or ``peft``.
        how: lines of code that load the model.
        remarks: on what was written.
    """
    sections = {
        "Use": f"```python\n{how}\n```" + "".join(f"\n\n{remark}" for remark in remarks),
        "Training": table(("setting", "value"), _rows(run, base)),
        "Result": _result(run),
        "Privacy": claim_text(run),
        "Exactness": exactness_text(run),
        "Communication": communication_text(run),
        "Licence": UNTOLD if licence is None else LICENCE.format(licence=licence),
    }
    lead = f"`{base}`, trained by {run.method} on data that stayed with {plural(_clients(run), 'client')}, with fedsb."
    return _front(run, hub_id, licence, library) + document(f"{base}, {run.method}", lead, sections)


def _front(run: Run, hub_id: str | None, licence: str | None, library: str) -> str:
    fields = {
        "base_model": hub_id,
        "library_name": library,
        "license": None if licence is None else [each.lower() for each in licence.split(", ")] if ", " in licence else licence.lower(),
        "tags": ["federated-learning", "fedsb", run.method],
    }
    return f"---\n{yaml.safe_dump({key: value for key, value in fields.items() if value}, sort_keys=True)}---\n\n"


def _clients(run: Run) -> int:
    return int(run.setting("federation.num_clients"))


def _rows(run: Run, base: str) -> list[Row]:
    shown = [(label, ", ".join(str(run.setting(key)) for key in keys)) for label, keys in SETTINGS]
    summary: Mapping[str, Any] = run.summary or {}
    return [
        ("base", base),
        *shown,
        ("clients", f"{_clients(run)}, a share of {run.setting('federation.fraction')} a round"),
        ("rounds", str(run.records[-1].round)),
        *((("of these", selected_text(summary["selected"])),) if summary.get("selected") else ()),
        ("trained parameters", f"{summary.get('trained_params', 0):,}"),
        ("factors sha256", f"`{summary.get('factors_sha256', '–')}`"),
    ]


def _result(run: Run) -> str:
    start, end = run.records[0].metrics, metrics_of(run.records, run.summary)
    if not end:
        return "Not measured."
    head = ("on the server's test part", "before training", f"after round {round_of(run.records, run.summary)}")
    return table(head, [(name, or_dash(start.get(name), name), metric_text(name, value)) for name, value in end.items()])
