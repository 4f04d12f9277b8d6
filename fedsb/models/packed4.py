"""A weight in 4 bits, two values a byte: torchao chooses the values, and its own tensor for them keeps a byte each.

torchao's tensors that pack them compute on some GPUs alone, and have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor


class Packed4(TorchAOBaseTensor):  # type: ignore[misc]
    """A matrix ``scale · q`` with q in −8 … 7 and a scale for each group of columns.

    Attributes:
        qdata: q + 8, (m, n / 2) bytes, the even columns in the lower half.
        scale: (m, groups), in the dtype that the matrix has.
    """

    tensor_data_names = ["qdata", "scale"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(cls, qdata: Tensor, scale: Tensor) -> Any:  # noqa: D102
        shape = (qdata.shape[0], 2 * qdata.shape[1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, device=qdata.device, dtype=scale.dtype, requires_grad=False)

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.qdata, self.scale = qdata, scale

    @classmethod
    def of(cls, q: Tensor, scale: Tensor) -> Packed4:
        """Pack values in −8 … 7, (m, n), with scales (m, groups)."""
        shifted = (q + 8).to(torch.uint8)
        return cls(shifted[:, 0::2] | shifted[:, 1::2] << 4, scale)

    def dequantize(self) -> Tensor:
        """Return the matrix (m, n)."""
        q = torch.stack((self.qdata & 15, self.qdata >> 4), dim=-1).to(torch.int8) - 8
        rows, groups = self.scale.shape
        return (q.view(rows, groups, -1) * self.scale[..., None]).view(rows, -1)
