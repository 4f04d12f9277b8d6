"""What outlives a loss of power is synced before it gets its name, and its folder behind that."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsb.core.disk import append_line, create_whole, replace_whole


def create(path: Path) -> None:
    create_whole(path, "whole")


def replace(path: Path) -> None:
    path.write_text("old")
    replace_whole(path, "whole")


def append(path: Path) -> None:
    with path.open("ab") as file:
        append_line(file, {"whole": 1})


@pytest.mark.parametrize(("write", "folder_too"), [(create, True), (replace, True), (append, False)])
def test_it_is_synced_whole_and_then_its_name(
    write: Callable[[Path], None], folder_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    path = tmp_path / "file"

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            seen.append(("folder", path.read_text()))
        else:
            seen.append(("file", Path(f"/proc/self/fd/{descriptor}").read_text()))

    monkeypatch.setattr(os, "fsync", sync)
    write(path)
    assert [kind for kind, _ in seen] == ["file", "folder"][: 1 + folder_too]
    assert all("whole" in content for _, content in seen)
