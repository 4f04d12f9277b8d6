"""Joint rules on what is learnt, and on which device: a task and the columns that it reads, workers and their GPUs."""

from __future__ import annotations

from collections.abc import Callable

from fedsb.config.schema import Config
from fedsb.core.errors import UserError


def _language_reads_one_text(config: Config) -> None:
    task, columns = config.model.task or config.data.task, config.data.text
    if task == "causal_lm" and not isinstance(columns, str) and len(columns) > 1:
        raise UserError(
            f"data.text=[{', '.join(columns)}] with data.task=causal_lm: a language model reads one text an example, and nothing says how "
            "to join two; join them into one column of the table, and name that one in data.text"
        )


def _workers_see_their_gpu(config: Config) -> None:
    if config.runtime.kind != "ray" or not config.device.startswith("cuda"):
        return
    if ":" in config.device:
        raise UserError(f"device={config.device} with runtime=ray: each worker sees the GPU that Ray gives it alone; use device=cuda")
    if config.runtime.gpus == 0:
        raise UserError("device=cuda with runtime.gpus=0: workers that reserve no GPU see none; leave it out, or give a share as in 0.25")


TASK_RULES: tuple[Callable[[Config], None], ...] = (_language_reads_one_text, _workers_see_their_gpu)
