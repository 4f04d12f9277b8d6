"""What a task is: how targets become tensors, what the loss is, and which metrics are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

Batch = Mapping[str, Tensor]
IGNORED = -100


class Task(Protocol):
    """A task over batches: ``input_ids``, ``attention_mask``, perhaps ``targets``, and ``learnt`` where not all tokens are.

    Packed rows (:func:`fedsb.data.packing.pack`) have ``position_ids`` in place of ``attention_mask``. Where a batch has ``places``,
    outputs are made at these alone.
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

    def places(self, batch: Batch) -> Tensor | None:
        """Return where in a batch the loss looks at outputs, indices into (batch · tokens,); None where that is not for it to choose."""

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

    def items(self, records: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """Return what is kept of each example, as :class:`fedsb.run.predictions.Predictions` has it."""
