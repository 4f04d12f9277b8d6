"""Other programs' records of a run, fed from its own: one small file a tracker, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fedsb.trackers.feed import Feed, Tracker
from fedsb.trackers.mlflow import MLflow
from fedsb.trackers.tensorboard import TensorBoard
from fedsb.trackers.wandb import WandB

TRACKERS: Mapping[str, Callable[[Path], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}

__all__ = ["TRACKERS", "Feed", "Tracker"]
