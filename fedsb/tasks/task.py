"""What is learnt: how targets become tensors, what the loss is, and which metrics are reported.

The seam between data, model and method: a new task is one class here and one row in :data:`TASKS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

Batch = Mapping[str, Tensor]
IGNORED = -100
PIECE = 2**22  # outputs that are widened at a time


class Task(Protocol):
    """A task over batches: ``input_ids``, ``attention_mask``, perhaps ``targets``, and ``learnt`` where not all tokens are.

    Packed rows (:func:`fedsb.data.packing.pack`) have ``position_ids`` in place of ``attention_mask``.
    """

    name: ClassVar[str]
    auto_class: ClassVar[Any]
    peft_type: ClassVar[str]
    has_head: ClassVar[bool]
    no_target: ClassVar[float]  # of an example that has no loss and no gradient

    def model_options(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the fields that the model's configuration needs."""

    def target_tensor(self, targets: Sequence[float]) -> Tensor:
        """Return the targets of a batch as a tensor (batch,)."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the outputs that the loss takes."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss over the batch's terms, a scalar."""

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return one loss an example, (batch,), each a function of its own example alone: what private training clips by."""

    def terms(self, batch: Batch) -> int:
        """Return how many terms the loss of a batch is the mean of: examples, or predicted tokens."""

    def record(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return what the metrics need, one row an example, on the CPU."""

    def metrics(self, records: Tensor, targets: Tensor | None) -> dict[str, float]:
        """Return the metrics over all examples, the loss first: the mean over examples, or over tokens."""


class _Labelled:
    """What classification and regression share: a sequence model with a head."""

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    peft_type: ClassVar[str] = "SEQ_CLS"
    has_head: ClassVar[bool] = True

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, (batch, labels)."""
        logits: Tensor = model(**{key: value for key, value in batch.items() if key != "targets"}).logits
        return logits

    def record(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the logits."""
        return outputs.detach().float().cpu()

    def terms(self, batch: Batch) -> int:
        """Return the number of examples."""
        return len(batch["input_ids"])


Counts = NDArray[np.float64]


# scikit-learn takes seconds to import, in every process that evaluates: as long as a small run takes altogether.
def confusion(truth: NDArray[np.int64], guess: NDArray[np.int64], classes: int) -> Counts:
    """Count examples by their class and the guessed one, (classes, classes)."""
    return np.bincount(truth * classes + guess, minlength=classes**2).reshape(classes, classes).astype(np.float64)


def macro_f1(counts: Counts) -> float:
    """Return the mean F1 over the classes that are true or guessed somewhere."""
    both = counts.sum(0) + counts.sum(1)
    seen = both > 0
    return float((2 * counts.diagonal()[seen] / both[seen]).mean())


def matthews(counts: Counts) -> float:
    """Return the correlation of classes and guesses (R_K, Gorodkin 2004); 0 where either is always the same."""
    true, guessed, total = counts.sum(1), counts.sum(0), counts.sum()
    spread = float((total**2 - true @ true) * (total**2 - guessed @ guessed))
    return float(counts.trace() * total - true @ guessed) / math.sqrt(spread) if spread else 0.0


class Classification(_Labelled):
    """Single-label classification: cross-entropy; accuracy, macro-F1 and Matthews' correlation."""

    name: ClassVar[str] = "classification"
    no_target: ClassVar[float] = IGNORED

    def model_options(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the label names for the model's configuration."""
        return {
            "num_labels": len(labels),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }

    def target_tensor(self, targets: Sequence[float]) -> Tensor:
        """Return class indices."""
        return torch.tensor(targets, dtype=torch.long)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy in nats."""
        return F.cross_entropy(outputs.float(), batch["targets"])

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of each example in nats."""
        return F.cross_entropy(outputs.float(), batch["targets"], reduction="none")

    def metrics(self, records: Tensor, targets: Tensor | None) -> dict[str, float]:
        """Return the cross-entropy, accuracy, macro-F1 and Matthews' correlation coefficient."""
        assert targets is not None
        counts = confusion(targets.numpy(), records.argmax(-1).numpy(), records.shape[-1])
        return {
            "loss": float(F.cross_entropy(records.double(), targets)),
            "accuracy": float(counts.trace() / counts.sum()),
            "macro_f1": macro_f1(counts),
            "matthews": matthews(counts),
        }


class Regression(_Labelled):
    """A real number an example: squared error; Pearson's and Spearman's correlation."""

    name: ClassVar[str] = "regression"
    no_target: ClassVar[float] = math.nan

    def model_options(self, labels: Sequence[str]) -> dict[str, Any]:
        """Ask for a single output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def target_tensor(self, targets: Sequence[float]) -> Tensor:
        """Return float32 targets."""
        return torch.tensor(targets, dtype=torch.float32)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(outputs.float().squeeze(-1), batch["targets"])

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the squared error of each example; one whose target is NaN has none, and no gradient."""
        targets = batch["targets"]
        errors = outputs.float().squeeze(-1) - targets.nan_to_num()
        return torch.where(targets.isnan(), 0.0, errors).square()

    def metrics(self, records: Tensor, targets: Tensor | None) -> dict[str, float]:
        """Return the mean squared error, which is the loss too, and both correlations."""
        assert targets is not None
        guess, truth = records.squeeze(-1).double(), targets.double()
        mse = float(F.mse_loss(guess, truth))
        return {
            "loss": mse,
            "mse": mse,
            "pearson": _correlation(guess, truth),
            "spearman": _correlation(_ranks(guess), _ranks(truth)),
        }


class CausalLM:
    """Next-token prediction, over the whole text or over the tokens that a batch says are ``learnt``: mean cross-entropy a token."""

    name: ClassVar[str] = "causal_lm"
    no_target: ClassVar[float] = IGNORED  # not looked at: a single token predicts nothing
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    peft_type: ClassVar[str] = "CAUSAL_LM"
    has_head: ClassVar[bool] = False

    def model_options(self, labels: Sequence[str]) -> dict[str, Any]:
        """Turn the key-value cache off: nothing is generated here."""
        return {"use_cache": False}

    def target_tensor(self, targets: Sequence[float]) -> Tensor:
        """Return an empty tensor; the targets are the tokens themselves."""
        return torch.empty(0)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, (batch, tokens, vocabulary)."""
        read = ("input_ids", "attention_mask", "position_ids")
        logits: Tensor = model(**{key: batch[key] for key in read if key in batch}).logits
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood in nats a predicted token; padding does not count. 0 where nothing is predicted."""
        tokens = self._next_tokens(batch)
        total = F.cross_entropy(outputs.flatten(0, 1).float(), tokens.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (tokens != IGNORED).sum().clamp(min=1)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood a predicted token of each example: not of the batch, whose others it must not know."""
        tokens = self._next_tokens(batch)
        nll = F.cross_entropy(outputs.flatten(0, 1).float(), tokens.flatten(), ignore_index=IGNORED, reduction="none").view_as(tokens)
        return nll.sum(-1) / (tokens != IGNORED).sum(-1).clamp(min=1)

    def terms(self, batch: Batch) -> int:
        """Return the number of predicted tokens."""
        return int((self._wanted(batch) != 0).sum())

    def record(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return (summed negative log-likelihood, number of predicted tokens) of each example.

        What is computed from the outputs is computed in pieces, none of which is large beside them.
        """
        tokens = self._next_tokens(batch)
        rows, wanted = outputs.detach().flatten(0, 1), tokens.flatten()
        step = max(1, PIECE // rows.shape[-1])
        # In one place from the start: small results between the pieces would keep their memory from being used again.
        nll = rows.new_empty(len(rows), dtype=torch.float32)
        for i in range(0, len(rows), step):
            piece = slice(i, i + step)
            nll[piece] = F.cross_entropy(rows[piece].float(), wanted[piece], ignore_index=IGNORED, reduction="none")
        return torch.stack([nll.view_as(tokens).double().sum(-1), (tokens != IGNORED).sum(-1).double()], dim=-1).cpu()

    def metrics(self, records: Tensor, targets: Tensor | None) -> dict[str, float]:
        """Return the loss and the perplexity over all predicted tokens, however they were batched."""
        loss = records[:, 0].sum() / records[:, 1].sum()
        return {"loss": float(loss), "perplexity": float(loss.exp())}

    @staticmethod
    def _next_tokens(batch: Batch) -> Tensor:
        """Return what follows at each place, (batch, tokens); nothing does at the last one, or before padding and what is not learnt."""
        # Not the outputs are shifted, but these: without their last place outputs would be copied to be flattened.
        wanted = CausalLM._wanted(batch)
        return F.pad(batch["input_ids"][:, 1:].masked_fill(wanted == 0, IGNORED), (0, 1), value=IGNORED)

    @staticmethod
    def _wanted(batch: Batch) -> Tensor:
        return batch["learnt" if "learnt" in batch else "attention_mask"][:, 1:]


TASKS: dict[str, Task] = {"classification": Classification(), "regression": Regression(), "causal_lm": CausalLM()}


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else 0.0


def _ranks(x: Tensor) -> Tensor:
    """Average ranks, so that ties count as in Spearman's definition."""
    _, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks: Tensor = ends - (counts.double() - 1) / 2
    return ranks[inverse]
