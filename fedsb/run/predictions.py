"""What a run's model made of each item of the server's test part: kept beside the records, so that runs can be compared item by item."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedsb.core.disk import replace_whole
from fedsb.core.errors import UserError

FILE = "predictions.safetensors"
WEIGHT = "_weight"
Column = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """What was measured of each item, in the order of the items.

    Attributes:
        round: after which it was measured.
        items: SHA-256 of the items and their order: what is measured on others is not paired with it.
        columns: by name, (items,) each. One that has the name of a metric holds what the metric is the mean of; where ``NAME_weight`` is
            there, the mean is weighted by it (tokens of a loss). The rest is to be looked at: ``guess`` and ``truth`` are class indices.
    """

    round: int
    items: str
    columns: Mapping[str, Column]

    def measured(self, metric: str) -> tuple[Floats, Floats]:
        """Return the values that a metric is the mean of and their weights, (items,) each.

        Raises:
            KeyError: the metric is no mean over items, or was not measured.
        """
        values = self.columns[metric].astype(np.float64)
        return values, self.columns.get(f"{metric}{WEIGHT}", np.ones(len(values))).astype(np.float64)


def write_predictions(folder: Path, found: Predictions) -> Path:
    """Write the predictions of a run into its folder, whole or not at all."""
    facts = json.dumps({"round": found.round, "items": found.items})
    replace_whole(folder / FILE, save({name: np.ascontiguousarray(column) for name, column in found.columns.items()}, {"facts": facts}))
    return folder / FILE


def read_predictions(folder: Path) -> Predictions | None:
    """Return the predictions of a run; None where it kept none: its clients measured it, it did not finish, or it is of an earlier version.

    Raises:
        UserError: the file can't be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return Predictions(facts["round"], facts["items"], {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"'{path}' can't be read ({' '.join(str(error).split())[:80]}); run it again, or remove the file") from None
