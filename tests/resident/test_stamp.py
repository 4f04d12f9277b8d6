"""What a worker looks at before each message: whatever changes of its file or data is noticed, and the look has a bound."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedsb.resident import service


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("data/a.csv", "data/deep/b.csv", "apart.csv"):
        (tmp_path / name).write_text("text,label\n")
    said = {"client": "a", "data": {"path": "data", "test_path": "apart.csv"}}
    (path := tmp_path / "node.yaml").write_text(yaml.safe_dump(said))
    return path


@pytest.mark.parametrize("name", ["node.yaml", "data/a.csv", "data/deep/b.csv", "apart.csv"])
def test_a_change_of_any_file_is_noticed_and_none_where_there_is_none(name: str, file: Path) -> None:
    before = service._stamp(file)
    assert service._stamp(file) == before
    changed = file.parent / name
    changed.write_text(changed.read_text() + "\n")
    assert service._stamp(file) != before


def test_files_that_come_or_go_are_noticed_and_a_loop_of_folders_has_an_end(file: Path) -> None:
    (file.parent / "data" / "deep" / "up").symlink_to(file.parent / "data")
    before = service._stamp(file)
    (new := file.parent / "data" / "deep" / "c.csv").touch()
    assert service._stamp(file) != before
    between = service._stamp(file)
    new.unlink()
    assert service._stamp(file) != between


def test_of_more_files_than_are_looked_at_nothing_is_trusted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_PLACES", 6)
    assert service._stamp(file) == service._stamp(file)
    (file.parent / "data" / "one-more.csv").touch()
    assert service._stamp(file) != service._stamp(file)
