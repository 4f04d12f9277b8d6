"""A run read back from its folder: its configuration, and what its server held last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsb.adapters import SPECS
from fedsb.config.compose import read
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.run.checkpoint import LABELS, Snapshot, load_checkpoint


@dataclass(frozen=True)
class Finished:
    """What is left of a run.

    Attributes:
        config: its configuration, with what was to be otherwise.
        snapshot: of its last whole checkpoint, or of the round that it has chosen.
        whole: whether it has finished.
    """

    config: Config
    snapshot: Snapshot
    whole: bool


def is_run(folder: Path) -> bool:
    """Tell whether a folder is that of a run."""
    return (folder / "config.yaml").is_file()


def left_of(folder: Path, remedy: str, changes: Sequence[str] = ()) -> Finished:
    """Read a run back.

    Args:
        folder: of the run.
        remedy: what cannot be done where nobody holds the whole model.
        changes: to its configuration.

    Raises:
        UserError: the folder holds no run, one whose clients keep a part of the model, or no checkpoint yet.
    """
    if not is_run(folder):
        raise UserError(f"'{folder}' holds no run (config.yaml is missing); give the output folder of a run")
    config = read(folder / "config.yaml", changes)
    if own := SPECS[config.method.adapter].own:
        raise UserError(
            f"'{folder}' holds no whole model: with method={config.method.name} each client keeps its own {', '.join(own)}; there is "
            f"nothing to {remedy}"
        )
    try:
        snapshot = load_checkpoint(folder / "checkpoints", number=_chosen(folder))
    except FileNotFoundError:
        raise UserError(f"'{folder}' holds no checkpoint: the run did not finish its start") from None
    return Finished(_of_its_classes(config, snapshot), snapshot, (folder / "summary.json").is_file())


def _chosen(folder: Path) -> int | None:
    """Return the round that a finished run has chosen; None where that is its last one."""
    path = folder / "summary.json"
    selected = json.loads(path.read_text(encoding="utf-8")).get("selected") if path.is_file() else None
    return None if selected is None else int(selected["round"])


def _of_its_classes(config: Config, snapshot: Snapshot) -> Config:
    """Name the classes that the head has rows for: the data may have others by now, or be gone."""
    labels = tuple(snapshot.carried.facts.get(LABELS, ()))
    return replace(config, data=replace(config.data, labels=labels)) if labels and config.data.labels is None else config
