"""A weight in 4-bit floats: bitsandbytes' NF4 (Dettmers et al. 2023, QLoRA, section 3) and FP4, with its own kernels on each device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsb.models.bits_and_bytes import bitsandbytes

BLOCK = 64  # weights that share a scale


class Blocks4(Tensor):
    """A matrix of code values times a scale for each block of 64 weights, row after row: a block may begin in one row and end in the next.

    Attributes:
        qdata: (m · n / 2, 1) bytes of two indices into the code, the first in the upper half.
        scale: (m · n / 64,) float32, each block's largest magnitude.
        code: ``nf4`` or ``fp4``.
    """

    qdata: Tensor
    scale: Tensor
    code: str
    # Else torch would wrap every call to see whether it is overridden.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor, code: str, shape: Sequence[int], dtype: torch.dtype) -> Any:  # noqa: D102
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), device=qdata.device, dtype=dtype, requires_grad=False)
        made.qdata, made.scale, made.code = qdata, scale, code
        return made

    def __init__(self, *_: object) -> None: ...

    def __repr__(self) -> str:  # type: ignore[override]
        """Return what it is; torch's own would look at values, and a compiler writes weights into its log."""
        return f"{type(self).__name__}({self.code}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def of(cls, weight: Tensor, code: str) -> Blocks4:
        """Round a matrix (m, n), where 64 divides m · n, to what has its dtype again."""
        packed, state = bitsandbytes("functional").quantize_4bit(
            weight.contiguous(), quant_type=code, blocksize=BLOCK, compress_statistics=False
        )
        return cls(packed, state.absmax, code, weight.shape, weight.dtype)

    def dequantize(self) -> Tensor:
        """Return the matrix (m, n)."""
        # A row a block: on CPUs with AVX512 its kernel reads the wrong scales where a block ends inside a row.
        blocks = torch.ops.bitsandbytes.dequantize_4bit(self.qdata, self.scale, BLOCK, self.code, [len(self.scale), BLOCK], self.dtype)
        made: Tensor = blocks.view(self.shape)
        return made

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, torch.dtype]]:
        """Return the names of the plain tensors, and what else there is beside the shape."""
        return ["qdata", "scale"], (self.code, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, parts: Mapping[str, Tensor], rest: tuple[str, torch.dtype], shape: Sequence[int], _: object) -> Blocks4:
        """Put back together what :meth:`__tensor_flatten__` took apart."""
        return cls(parts["qdata"], parts["scale"], rest[0], shape, rest[1])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Blocks4:
        return type(self)(change(self.qdata), change(self.scale), self.code, self.shape, self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Copy and move it; whoever would compute with it dequantises it first."""
        if func not in _MOVES or (kwargs or {}).get("dtype") not in (None, args[0].dtype):
            raise NotImplementedError(f"{func} of a weight in 4 bits: dequantise it first")
        options = {key: value for key, value in (kwargs or {}).items() if key != "dtype"}
        return args[0]._each(lambda part: func(part, *args[1:], **options))


_aten = torch.ops.aten
_MOVES = (_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten._to_copy.default)
