"""Files of tensors and facts that are written whole or not at all, and carry a hash over both and the version of their format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsb.core.disk import sync_folder
from fedsb.core.errors import UserError
from fedsb.core.state import State
from fedsb.core.tensor_file import write_tensors
from fedsb.run.groups import digest_of, grouped

FORMAT = 3  # 1 has all deltas of the frozen log; 2 all that add to the frozen weights, and no sums in their place


class Damaged(ValueError):
    """A file of a checkpoint is not what was written."""


def write_whole(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a file in place of what is there; when this returns it is on the disk."""
    text = json.dumps(facts)
    scratch = path.with_suffix(".part")
    write_tensors(scratch, tensors, {"facts": text, "sha256": digest_of(tensors, text)})
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def read_whole(path: Path) -> tuple[dict[str, State], dict[str, Any]]:
    """Return the states of a file by group, and its facts.

    Raises:
        Damaged: it is not there, or is not what was written.
        UserError: it was written by a later version.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("facts", "")
            # First: a later format may have other tensors, and hash them otherwise.
            _check_format(path, text)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Damaged(f"can't be read ({path.name}: {' '.join(str(error).split())[:80]})") from None
    if metadata.get("sha256") != digest_of(tensors, text):
        raise Damaged(f"is not what was written ({path.name}: its hash differs)")
    return grouped(tensors), json.loads(text)


def _check_format(path: Path, text: str) -> None:
    try:
        later = json.loads(text).get("format", FORMAT)
    except (ValueError, AttributeError):
        return  # damaged, as its hash will tell
    if isinstance(later, int) and later > FORMAT:
        raise UserError(f"'{path}' was written by a later version (format {later}, this one reads {FORMAT}); use that version")
