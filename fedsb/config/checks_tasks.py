"""Joint rules on what is learnt, and on which device: a task and the columns that it reads, workers and their GPUs."""

from __future__ import annotations

from collections.abc import Callable

from fedsb.config.derived import KEEPS_APART
from fedsb.config.schema import Config
from fedsb.core.errors import UserError, nearest

WAYS = ("text", "prompt", "messages", "template")  # keys of `data`, of which one says what an example is made of
BLIND = "takes no mask, and in a batch of several rows reads across examples"  # flash attention


def _examples_are_made_in_one_way(config: Config) -> None:
    data = config.data
    given = [key for key in WAYS if getattr(data, key) is not None]
    if len(given) != 1:
        what = f"{' and '.join(f'data.{key}={getattr(data, key)}' for key in given)} are given" if given else "nothing is given"
        raise UserError(
            f"{what}: one of data.text, data.prompt with data.response, data.messages and data.template says what an example is made of"
        )
    if (data.prompt is None) != (data.response is None):
        there, missing = ("prompt", "response") if data.response is None else ("response", "prompt")
        raise UserError(f"data.{there}={getattr(data, there)} without data.{missing}: add the column, as in data.{missing}={missing}")
    if given != ["text"] and data.task != "causal_lm":
        raise UserError(f"data.{given[0]}={getattr(data, given[0])} is for language models alone; add data.task=causal_lm")
    if data.system is not None and given[0] not in ("prompt", "messages"):
        raise UserError(
            f"data.system goes with data.prompt or data.messages, and data.{given[0]} is given; write it there, or leave it out"
        )


def _language_reads_one_text(config: Config) -> None:
    task, columns = config.model.task or config.data.task, config.data.text
    if task == "causal_lm" and columns is not None and not isinstance(columns, str) and len(columns) > 1:
        raise UserError(
            f"data.text=[{', '.join(columns)}] with data.task=causal_lm: a language model reads one text an example, and nothing says how "
            "to join two; join them into one column of the table, and name that one in data.text"
        )


def _packing_has_rows(config: Config) -> None:
    if not config.train.packing:
        return
    task = config.model.task or config.data.task
    if task != "causal_lm":
        raise UserError(f"train.packing=true with the task '{task}': only a language model's examples share rows; leave train.packing out")
    attention = config.model.attn_implementation
    if attention is not None and attention not in KEEPS_APART:
        blind = attention.startswith("flash_attention")
        why = BLIND if blind else f"is not known to keep examples apart{nearest(attention, KEEPS_APART)}"
        raise UserError(
            f"train.packing=true with model.attn_implementation={attention}, which {why}; "
            "use model.attn_implementation=sdpa, or leave train.packing out"
        )
    if config.privacy.unit == "example":
        raise UserError(
            "train.packing=true with privacy=example: each gradient is clipped by itself, and those of one row are not told apart; "
            "leave train.packing out"
        )
    if config.runtime.stack != 1:
        raise UserError(
            f"train.packing=true with runtime.stack={config.runtime.stack}: a stack puts several clients into one batch, by rows of one "
            "example each; choose one of the two"
        )


def _workers_see_their_gpu(config: Config) -> None:
    if config.runtime.kind != "ray" or not config.device.startswith("cuda"):
        return
    if ":" in config.device:
        raise UserError(f"device={config.device} with runtime=ray: each worker sees the GPU that Ray gives it alone; use device=cuda")
    if config.runtime.gpus == 0:
        raise UserError("device=cuda with runtime.gpus=0: workers that reserve no GPU see none; leave it out, or give a share as in 0.25")


TASK_RULES: tuple[Callable[[Config], None], ...] = (
    _examples_are_made_in_one_way,
    _language_reads_one_text,
    _packing_has_rows,
    _workers_see_their_gpu,
)
