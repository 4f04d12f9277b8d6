"""Tasks whose examples have a target each: classification and regression, by a model with a head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from fedsb.tasks.protocol import IGNORED, Batch


class _Labelled:
    """What classification and regression share: a sequence model with a head."""

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    peft_type: ClassVar[str] = "SEQ_CLS"
    has_head: ClassVar[bool] = True

    def places(self, batch: Batch) -> None:
        """Return nothing: an output an example is all there is."""

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

    def items(self, records: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """Return each example's cross-entropy, whether its class was found, which was, and which it is."""
        assert targets is not None
        guess = records.argmax(-1)
        loss = F.cross_entropy(records.double(), targets, reduction="none").float()
        return {"loss": loss, "accuracy": (guess == targets).to(torch.uint8), "guess": guess.int(), "truth": targets.int()}


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

    def items(self, records: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """Return each example's squared error, what was predicted, and what is true."""
        assert targets is not None
        guess, truth = records.squeeze(-1), targets.float()
        error = (guess.double() - targets.double()).square().float()
        return {"loss": error, "mse": error, "guess": guess, "truth": truth}


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
