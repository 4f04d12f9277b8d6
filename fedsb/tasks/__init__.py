"""What is learnt: how targets become tensors, what the loss is, and which metrics are reported."""

from fedsb.tasks.task import IGNORED, TASKS, Batch, Task

__all__ = ["IGNORED", "TASKS", "Batch", "Task"]
