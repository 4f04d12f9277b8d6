"""The check that a model keeps the examples of a packed row apart."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fedsb.adapters import NARROW
from fedsb.config.derived import KEEPS_APART
from fedsb.core.errors import UserError
from fedsb.core.logs import speaking_from
from fedsb.data import made_row
from fedsb.data.packing import rows
from fedsb.models.abilities import attention_of
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import collate, collate_packed
from fedsb.tasks.task import Task

LENGTHS = (7, 4, 5)  # of the made-up examples: no two alike, so that a position that runs on is seen
WIDTHS = (sum(LENGTHS), 11)  # of rows: flash attention keeps examples apart in a batch of one row alone
# Of the largest logit; examples that see each other are apart by about its size. The second where the base computes in bfloat16 or float16.
TOLERANCE, ROUGH_TOLERANCE = 1e-3, 5e-2


def check_packing(adapted: AdaptedModel, task: Task) -> None:
    """Hold, on made-up texts, that a model answers each example of one row and of several as it does alone.

    Raises:
        UserError: it does not: its attention reads across examples, its positions run on, or it is no attention (a state space).
    """
    assert adapted.tokenizer is not None
    if unknown := sorted(attention_of(adapted.model) - KEEPS_APART):
        raise _refused(adapted, f"computes attention by {unknown[0]}, which is not known to keep the examples of several rows apart")
    texts = [{"input_ids": made_row(adapted.tokenizer, length)} for length in LENGTHS]
    adapted.model.eval()
    # Which kernels a model that is refused would like better is no news.
    with torch.inference_mode(), speaking_from(logging.ERROR, "transformers"):
        alone = [task.forward(adapted.model, collate([text], adapted, task))[0] for text in texts]
        gap = max(_gap(adapted, task, texts, alone, width) for width in WIDTHS)
    rough = any(p.dtype in NARROW for p in adapted.model.parameters())
    if not gap <= (ROUGH_TOLERANCE if rough else TOLERANCE) * max(float(logits.abs().max()) for logits in alone):
        raise _refused(adapted, f"lets the examples of a row see each other (its logits differ by {gap:.2g} from those of each alone)")


def _gap(adapted: AdaptedModel, task: Task, texts: list[dict[str, list[int]]], alone: list[Tensor], width: int) -> float:
    """Return the largest difference of any logit in rows of ``width`` tokens."""
    try:
        together = task.forward(adapted.model, collate_packed(texts, adapted, task, width))
    except (TypeError, RuntimeError) as error:
        raise _refused(adapted, f"cannot compute packed rows ({str(error).splitlines()[0]})") from None
    gaps = []
    for logits, row in zip(together, rows(LENGTHS, width), strict=True):
        sizes = [LENGTHS[i] for i in row]
        parts = torch.split(logits[: sum(sizes)], sizes)
        gaps += [(part - alone[i]).abs().max() for part, i in zip(parts, row, strict=True)]
    return float(torch.stack(gaps).max())


def _refused(adapted: AdaptedModel, why: str) -> UserError:
    name = type(adapted.model).__name__
    return UserError(f"train.packing=true: {name} {why}; leave train.packing out, and examples of like length share batches")
