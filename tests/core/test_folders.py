"""A folder that cannot be made is one line, before anything is run, and the look leaves nothing behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedsb.app.exports.on_request import export
from fedsb.cli import main
from fedsb.core.errors import UserError
from fedsb.core.folders import check_makeable, claim, filled_whole, forget_empty


def test_a_folder_that_can_be_made_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    check_makeable(tmp_path / "there", "output=there")
    check_makeable(tmp_path / "some" / "where" / "deep", "output=deep")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=r"^output=x: '.*file' is a file; choose another folder$"):
            check_makeable(path, "output=x")
    with pytest.raises(UserError, match=r"^'.*file/x': '.*file' is a file; choose another folder$"):
        export(tmp_path, tmp_path / "file" / "x")


def test_what_the_machine_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^out: it can't be made \(.*\); choose another folder$"):
        check_makeable(Path("/proc/none/x"), "out")
    with pytest.raises(SystemExit, match="2"):
        main(["run", "output=/proc/none"])
    assert capsys.readouterr().err.startswith("error: output=/proc/none: it can't be made (")


def test_nobody_gets_a_folder_that_another_has(tmp_path: Path) -> None:
    wanted = tmp_path / "outputs" / "2026-01-02" / "03-04-05"
    with ThreadPoolExecutor(8) as threads:
        given = list(threads.map(lambda _: claim(wanted), range(40)))
    assert {path.name for path in given} == {"03-04-05", *(f"03-04-05-{number}" for number in range(1, 40))}
    for path in given[1:]:
        forget_empty(path)
    (given[0] / "config.yaml").touch()
    forget_empty(given[0])
    assert [path.name for path in wanted.parent.iterdir()] == [given[0].name]


def test_a_folder_that_cannot_be_claimed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "outputs").touch()
    with pytest.raises(UserError, match=r"can't be made \(.*\); name another folder with output=…$"):
        claim(tmp_path / "outputs" / "today" / "now")


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def fill(place: Path, *, fails: bool) -> None:
    with filled_whole(place) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "a").write_text("new")
        (scratch / "b").write_text("new")
        if fails:
            raise OSError("no room")


def test_a_folder_is_filled_whole_or_is_as_it_was(tmp_path: Path) -> None:
    place = tmp_path / "some" / "where" / "out"
    with pytest.raises(OSError, match="no room"):
        fill(place, fails=True)
    assert list(tmp_path.iterdir()) == []
    fill(place, fails=False)
    assert files_of(tmp_path) == {"some/where/out/b": "new", "some/where/out/deep/a": "new"}
    (place / "deep" / "a").write_text("old")
    (place / "mine").write_text("old")
    before = files_of(tmp_path)
    with pytest.raises(OSError, match="no room"):
        fill(place, fails=True)
    assert files_of(tmp_path) == before
    fill(place, fails=False)
    assert files_of(tmp_path) == {**before, "some/where/out/deep/a": "new"}
    assert [path.name for path in place.parent.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    fill(tmp_path / "out", fails=False)
    assert (tmp_path / "out").is_symlink()
    assert files_of(tmp_path / "disk") == {"b": "new", "deep/a": "new"}


def test_what_is_filled_can_be_read_by_whom_the_system_lets_read_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with filled_whole(tmp_path / "out") as scratch:
        (scratch / "inner").mkdir()
        for path in (scratch / "a.safetensors", scratch / "inner" / "b.safetensors"):
            save_file({"t": torch.ones(1)}, path)
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*.safetensors")}
    assert modes == {(tmp_path / "plain").stat().st_mode}
