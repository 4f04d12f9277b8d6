"""Files of float32 tensors in safetensors' format, a tensor at a time: the library's own writer first makes a copy of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fedsb.core.state import LINE, laid_out


def streamed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, align: int = 8) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file, those of ``safetensors.torch.save(sorted tensors)`` where there are no metadata.

    Args:
        tensors: by name; two may share memory.
        metadata: plain text by name.
        align: where the first tensor begins is a multiple of this.
    """
    if any(t.dtype != torch.float32 for t in tensors.values()):
        yield save({name: tensors[name].contiguous() for name in sorted(tensors)}, dict(metadata) if metadata is not None else None)
        return
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + 4 * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (math.ceil((8 + len(text)) / align) * align - 8 - len(text))
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(tensors):
        if tensors[name].numel():
            yield tensors[name].detach().cpu().contiguous().view(-1).numpy().astype("<f4", copy=False).data


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whose tensors begin on a cache line, so that they need not be copied when it is mapped."""
    with path.open("wb") as file:
        for piece in streamed(tensors, metadata, align=LINE):
            file.write(piece)


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file where they lie in it, by name: the system reads them when they are used, and forgets them as it likes.

    The file must not be written to as long as they are in use; it may be replaced or removed.
    """
    with safe_open(path, "pt") as file:
        return {key: laid_out(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
