"""What can be learnt: the seam between data, model and method. A new task is one class and one row in :data:`TASKS`."""

from __future__ import annotations

from fedsb.tasks.causal import CausalLM
from fedsb.tasks.labelled import Classification, Regression
from fedsb.tasks.protocol import IGNORED, Batch, Task

__all__ = ["IGNORED", "TASKS", "Batch", "CausalLM", "Classification", "Regression", "Task"]

TASKS: dict[str, Task] = {"classification": Classification(), "regression": Regression(), "causal_lm": CausalLM()}
