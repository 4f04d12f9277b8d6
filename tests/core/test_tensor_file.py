"""Files of tensors, written one by one: the bytes are those of the library's own writer."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save

from fedsb.core.state import LINE
from fedsb.core.tensor_file import mapped_tensors, streamed, write_tensors

TENSORS = {"state|U|b": torch.randn(5, 3).T, "state|A|ä": torch.randn(4), "state|V|b": torch.empty(0, 3), "a": torch.randn(7, 16)}


def test_the_bytes_are_those_of_safetensors() -> None:
    plain = {name: TENSORS[name].contiguous() for name in sorted(TENSORS)}
    assert b"".join(streamed(TENSORS)) == save(plain)
    mixed = {**plain, "i": torch.arange(3)}
    assert b"".join(streamed(mixed)) == save(dict(sorted(mixed.items())))


def test_what_is_written_is_read_back_by_anyone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {"facts": 'a "b" ä'})
    for found in (load_file(path), mapped_tensors(path)):
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], t) for name, t in TENSORS.items())
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % LINE == 0
    path.unlink()
