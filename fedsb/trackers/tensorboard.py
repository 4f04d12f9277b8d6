"""TensorBoard: event files in ``tensorboard/``, below the folder of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from fedsb.run.records import RoundRecord, finite
from fedsb.trackers.numbers import numbers_of

FOLDER = "tensorboard"
NO_TIME = 0.0  # of events whose own may tell of data


class TensorBoard:
    """A writer of scalars, by round; the summary is a text."""

    dates: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        self._writer = writer(str(folder / FOLDER))

    def record(self, record: RoundRecord) -> None:
        """Write a scalar a number."""
        time = NO_TIME if record.wall_s is None else None
        for name, value in numbers_of(record).items():
            self._writer.add_scalar(name, value, record.round, walltime=time, new_style=True, double_precision=True)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary."""
        time = NO_TIME if summary["wall_s"] is None else None
        self._writer.add_text("summary", json.dumps(finite(summary), indent=1), summary["rounds_done"], walltime=time)

    def close(self, *, whole: bool) -> None:
        """Close the file."""
        self._writer.close()
