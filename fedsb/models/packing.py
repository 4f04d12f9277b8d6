"""The check that a model keeps the examples of a packed row apart."""

from __future__ import annotations

import torch

from fedsb.adapters import NARROW
from fedsb.core.errors import UserError
from fedsb.data import made_row
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import collate, collate_packed
from fedsb.tasks.task import Task

LENGTHS = (7, 4, 5)  # of the made-up examples: no two alike, so that a position that runs on is seen
# Of the largest logit; examples that see each other are apart by about its size. The second where the base computes in bfloat16 or float16.
TOLERANCE, ROUGH_TOLERANCE = 1e-3, 5e-2


def check_packing(adapted: AdaptedModel, task: Task) -> None:
    """Hold, on made-up texts, that a model answers each example of a row as it does alone.

    Raises:
        UserError: it does not: its attention reads across examples, its positions run on, or it is no attention (a state space).
    """
    assert adapted.tokenizer is not None
    texts = [{"input_ids": made_row(adapted.tokenizer, length)} for length in LENGTHS]
    adapted.model.eval()
    with torch.inference_mode():
        alone = [task.forward(adapted.model, collate([text], adapted, task))[0] for text in texts]
        try:
            together = task.forward(adapted.model, collate_packed(texts, adapted, task, sum(LENGTHS)))[0]
        except (TypeError, RuntimeError) as error:
            raise _refused(adapted, f"cannot compute packed rows ({str(error).splitlines()[0]})") from None
    parts = torch.split(together, sorted(LENGTHS, reverse=True))
    order = sorted(range(len(LENGTHS)), key=lambda i: -LENGTHS[i])
    gap = max(float((parts[place] - alone[i]).abs().max()) for place, i in enumerate(order))
    rough = any(p.dtype in NARROW for p in adapted.model.parameters())
    if not gap <= (ROUGH_TOLERANCE if rough else TOLERANCE) * max(float(logits.abs().max()) for logits in alone):
        raise _refused(adapted, f"lets the examples of a row see each other (its logits differ by {gap:.2g} from those of each alone)")


def _refused(adapted: AdaptedModel, why: str) -> UserError:
    name = type(adapted.model).__name__
    return UserError(f"train.packing=true: {name} {why}; leave train.packing out, and examples of like length share batches")
