"""Laws of a ledger's name: one data set has one, however its path is written; and ledgers of earlier versions are found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsb.privacy.naming import client_folder, name_of_data


def old_folder(path: str) -> str:
    """The folder of a real node's ledger as the version of November 2026 named it."""
    digest = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:12]
    return f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in Path(path).name)[:48]}-{digest}"


def over_link(path: Path, count: int) -> Path:
    """Return a link to a path's folder, and the path over it."""
    link = path.parents[1] / f"link {count}"
    if not link.is_symlink():
        link.symlink_to(path.parent)
    return link / path.name


# Ways to write the same path, one after the other.
WAYS: dict[str, Callable[[Path], Path]] = {
    "absolute": lambda path: path.absolute() if path.parts[0] != "~" else path,
    "relative": lambda path: Path(os.path.relpath(path.expanduser())),
    "home": lambda path: Path("~") / os.path.relpath(path.expanduser(), Path.home()),
    "up and down": lambda path: path.parent / ".." / path.parent.name / path.name if path.parent.name not in ("", "..", "~") else path,
    "dots": lambda path: Path(os.path.join(path.parent, ".", "", path.name)),
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ways=st.lists(st.sampled_from(sorted(WAYS)), max_size=4), link=st.booleans(), folder=st.sampled_from(["", "data", "data/sub"]))
def test_a_path_has_one_name_however_it_is_written(ways: list[str], link: bool, folder: str, tmp_path: Path) -> None:
    data = tmp_path / "data" / "sub"
    data.mkdir(parents=True, exist_ok=True)
    file = data / "a b.csv"
    file.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        patch.chdir(tmp_path / folder)
        path = over_link(file, 0) if link else file
        for way in ways:
            path = WAYS[way](path)
        assert path.expanduser().samefile(file)
        found, plain = name_of_data("a", str(path)), name_of_data("b", str(file))
        assert (found.folder, found.readable) == (plain.folder, plain.readable) == (plain.folder, "a b.csv")
        assert set(found.endings) >= set(plain.endings)


def test_another_file_has_another_name(tmp_path: Path) -> None:
    names = {name_of_data("a", str(tmp_path / name)).folder for name in ("a.csv", "b.csv", "a.csv/a.csv")}
    assert len(names | {name_of_data("a", None).folder, name_of_data("b", None).folder}) == 5


@pytest.mark.parametrize("written", ["a b.csv", "link.csv", "~/a b.csv"])
def test_the_folder_that_an_earlier_version_made_is_known(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.csv").touch()
    (tmp_path / "link.csv").symlink_to(tmp_path / "a b.csv")
    assert any(old_folder(written).endswith(ending) for ending in name_of_data("a", written).endings)


def test_a_name_of_the_operators_counts_and_what_was_charged_before_it_stays(tmp_path: Path) -> None:
    by_path, by_name = (name_of_data("a", str(tmp_path / "v1"), ledger) for ledger in (None, "cohort"))
    assert by_name.folder == name_of_data("b", str(tmp_path / "v2"), "cohort").folder != by_path.folder
    assert by_path.folder in by_name.others
    assert by_name.endings == by_path.endings
    assert name_of_data("a", None, "cohort").folder == by_name.folder


def test_a_client_of_a_simulation_has_a_folder_that_can_be_made(tmp_path: Path) -> None:
    assert client_folder("client-0") == "client-0"
    odd = [client_folder(client) for client in ("a/b", "a_b", "ä" * 300, "..", "")]
    assert len(set(odd)) == 5
    for name in odd[:-1]:
        (tmp_path / name).mkdir()
