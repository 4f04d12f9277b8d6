"""Joint rules on what is learnt: a task and the columns that it reads."""

from __future__ import annotations

from collections.abc import Callable

from fedsb.errors import UserError
from fedsb.schema import Config


def _language_reads_one_text(config: Config) -> None:
    task, columns = config.model.task or config.data.task, config.data.text
    if task == "causal_lm" and not isinstance(columns, str) and len(columns) > 1:
        raise UserError(
            f"data.text=[{', '.join(columns)}] with data.task=causal_lm: a language model reads one text an example, and nothing says how "
            "to join two; join them into one column of the table, and name that one in data.text"
        )


TASK_RULES: tuple[Callable[[Config], None], ...] = (_language_reads_one_text,)
