"""Named groups of states as the tensors of one file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from fedsb.core.state import Name, State
from fedsb.core.tensor_file import streamed


def tensors_of(groups: Mapping[str, State]) -> dict[str, Tensor]:
    """Return the tensors of a file that holds states by group, by the names that they have in it."""
    return {f"{g}|{n.role}|{n.module}": t.detach() for g, state in groups.items() for n, t in state.items()}


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, State]:
    """Return states by group out of the tensors of a file: the inverse of :func:`tensors_of`."""
    groups: dict[str, dict[Name, Tensor]] = {}
    for key, tensor in tensors.items():
        group, role, module = key.split("|", 2)
        groups.setdefault(group, {})[Name(module, role)] = tensor
    return {group: State(found) for group, found in groups.items()}


def digest_of(tensors: dict[str, Tensor], text: str) -> str:
    """Return a hash over tensors and the text of the facts beside them."""
    digest = hashlib.sha256()
    for piece in streamed(tensors):
        digest.update(piece)
    digest.update(text.encode())
    return digest.hexdigest()
