"""Weights & Biases: a run in ``wandb/``, below the folder of the run, and at its server unless ``WANDB_MODE=offline``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from fedsb.run.records import RoundRecord
from fedsb.trackers.numbers import identity_of, numbers_of

PROJECT = "fedsb"
WAIT_S = 20.0  # for the server, at the beginning
LEFT_S = 60.0  # for what is not sent yet, at the end; `wandb sync` sends what is left then
# What it would gather of itself: the machine, the code, what is printed.
NOTHING_ELSE: Mapping[str, Any] = {
    "silent": True, "console": "off", "disable_git": True, "disable_code": True, "save_code": False, "disable_job_creation": True,
    "x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip


class WandB:
    """A run of W&B; its configuration is what tells the run from others, of the summary. One that is resumed is a run of its own."""

    dates: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        library = import_module("wandb")
        library.setup(library.Settings(silent=True))
        place = folder.resolve()
        waits = {"init_timeout": WAIT_S, "finish_timeout": LEFT_S, "finish_timeout_raises": True}
        known = {key: value for key, value in waits.items() if key in library.Settings.model_fields}  # not all of them of old
        settings = library.Settings(host="", **known, **NOTHING_ELSE)
        mode = os.environ.get("WANDB_MODE")  # it reads that once a process itself
        self._run = library.init(project=PROJECT, name=place.name, dir=str(place), mode=mode, settings=settings, reinit="create_new")

    def record(self, record: RoundRecord) -> None:
        """Log the numbers of a round."""
        self._run.log(numbers_of(record), step=record.round)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Set the configuration."""
        self._run.config.update(identity_of(summary))

    def close(self, *, whole: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if whole else 1)
