"""MLflow: a run of its local file store ``mlruns/``, below the folder of the run, or of where ``MLFLOW_TRACKING_URI`` leads."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from fedsb.run.records import RoundRecord
from fedsb.trackers.numbers import identity_of, numbers_of

FOLDER, NOTE = "mlruns", "mlflow_run"  # the note names the run, which one that is resumed takes the place of
EXPERIMENT = "fedsb"
WAIT_S = "20"  # for the answer to a request
MOST = 1000  # metrics that a server takes at a time


class MLflow:
    """A run of MLflow; its parameters are what tells the run from others, of the summary."""

    dates: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        # MLflow keeps its file store as it is, and has it asked for.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # Nobody waits minutes for a server that is not there, or takes what is asked and answers nothing.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", WAIT_S)
        self._metric = import_module("mlflow.entities").Metric
        self._param = import_module("mlflow.entities").Param
        address = os.environ.get("MLFLOW_TRACKING_URI") or (folder.resolve() / FOLDER).as_uri()
        self._client = import_module("mlflow.tracking").MlflowClient(tracking_uri=address)
        self._forget(folder / NOTE)
        experiment = _experiment(self._client)
        self._begun = int(time.time() * 1000)
        self._run = self._client.create_run(experiment, start_time=self._begun, run_name=folder.resolve().name).info.run_id
        (folder / NOTE).write_text(f"{self._run}\n", encoding="utf-8")
        self._timeless = False

    def _forget(self, note: Path) -> None:
        if note.is_file():
            with suppress(Exception):  # it is not there any more
                self._client.delete_run(note.read_text(encoding="utf-8").strip())

    def record(self, record: RoundRecord) -> None:
        """Log a metric a number, by round; one whose own time may tell of data has that of the run's begin."""
        self._timeless = record.wall_s is None
        stamp = self._now()
        rows = [self._metric(name, value, stamp, record.round) for name, value in numbers_of(record).items()]
        for first in range(0, len(rows), MOST):
            self._client.log_batch(self._run, metrics=rows[first : first + MOST])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log what tells the run from others."""
        self._client.log_batch(self._run, params=[self._param(key, value) for key, value in identity_of(summary).items()])

    def close(self, *, whole: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run, "FINISHED" if whole else "FAILED", end_time=self._now())

    def _now(self) -> int:
        return self._begun if self._timeless else int(time.time() * 1000)


def _experiment(client: Any) -> str:
    """Return the id of the experiment that all runs are of, made where nobody has, be it in the same moment."""
    if (known := client.get_experiment_by_name(EXPERIMENT)) is None:
        try:
            return str(client.create_experiment(EXPERIMENT))
        except Exception:
            if (known := client.get_experiment_by_name(EXPERIMENT)) is None:
                raise
    return str(known.experiment_id)
